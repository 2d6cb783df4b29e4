r"""Variational autoencoders in Pyro, and what their numbers mean.

A model p(z) p(x|z) and a guide q(z|x) are Pyro functions. What is maximised, and what is reported, is a
reduction of their log-weights log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n), and it obeys

.. math:: \log p(x) = \underbrace{\mathbb{E}_q \log p(x \mid z) - \mathrm{KL}\bigl(q(z \mid x) \,\|\, p(z)\bigr)}
    _{\mathrm{ELBO}} + \mathrm{KL}\bigl(q(z \mid x) \,\|\, p(z \mid x)\bigr)

In six lines::

    import pyro_vae as pv

    digits = pv.data.load("digits", binarize="dynamic")
    vae = pv.mlp_vae(digits.event_shape, latent_dim=2, hidden_dims=(200,))
    history = pv.fit(vae, digits.train, pv.ELBO(), epochs=50, batch_size=64, lr=1e-3)
    print(pv.compare(vae, digits.test.x))
"""

import lazy_loader

__version__ = "0.1.0"

# Each name in __init__.pyi is imported at its first use, so that to import the package takes no time.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
