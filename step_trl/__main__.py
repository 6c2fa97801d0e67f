"""`python -m step_trl` is `step-trl`; so `accelerate launch -m step_trl train` works."""

from .cli.main import main


main()
