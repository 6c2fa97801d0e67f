"""How the model of the testbed was trained."""
