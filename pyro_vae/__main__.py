"""``python -m pyro_vae``: the command line, as ``torchrun -m pyro_vae`` starts it."""

from pyro_vae_command import main

main()
