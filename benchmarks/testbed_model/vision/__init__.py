"""How the model of the visual testbed was trained."""
