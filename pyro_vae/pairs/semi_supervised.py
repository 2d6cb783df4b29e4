"""The semi-supervised VAE with partly observed labels: model p(y) p(z) p(x|z, y) and guide q(y|x) q(z|x, y)."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_vae.checks import checked, is_dense
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.likelihoods import Likelihood
from pyro_vae.networks import apply_batched
from pyro_vae.pairs.base import Labelled, check_labels, described, in_evaluation_mode, mean_of, on_own_device

UNOBSERVED = -1
IMPOSSIBLE = -1e4  # a logit of probability zero in any precision; minus infinity times zero would be NaN


class SemiSupervisedVAE(Labelled):
    r"""A VAE with a label that is observed for some data and latent for the others (the M2 model of Kingma et al.).

    .. math::
        \text{model:}\quad y_n \sim \mathrm{Uniform},\ z_n \sim p(z),\ x_n \sim p(x \mid z_n, y_n) \qquad\qquad
        \text{guide:}\quad y_n \sim q(y \mid x_n),\ z_n \sim q(z \mid x_n, y_n)

    At an observed label the guide puts probability 1 on it, so the bound is on :math:`\log p(x, y)`. For the other data
    it is on :math:`\log p(x)`. The site ``y`` can't be reparameterised. To **sample** it, use
    ``pv.ELBO(gradient="score")``, ``pv.IWAE(K, "vimco")`` or another objective with these gradients. To **enumerate**
    it, use Pyro's ``TraceEnum_ELBO(max_plate_nesting=1)`` with ``pyro.infer.config_enumerate(vae.guide)``.

    The bound has no gradient that fits q(y|x) to observed labels. With a `classifier_weight` :math:`\alpha`, each
    observed label adds :math:`\alpha \log q(y_n \mid x_n)` to the term of its datum while the classifier is in training
    mode. The sum is not a bound. Estimates such as :func:`pyro_vae.log_likelihood` omit this term. Before
    ``pv.ELBO().bound``, call ``vae.eval()``.

    Arguments:
        prior, likelihood, posterior: as in :class:`ConditionalVAE`, where y is indicator vectors.
        classifier: a network from (N, *event) to (N, C), the logits of q(y|x).
        num_classes: C, the number of classes.
        classifier_weight: alpha, at least 0.

    Raises:
        ValueError: `classifier_weight` is negative or not finite. When it runs: x or y of another shape or type, or
            labels out of range.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_semi_supervised_vae((5,), latent_dim=2, num_classes=3, likelihood="gaussian")
        >>> x, y = torch.randn(100, 5), torch.randint(-1, 3, (100,))  # -1 is an unobserved label
        >>> history = pv.fit(vae, (x, y), pv.ELBO(gradient="score"), epochs=1)
        >>> vae.classify(x).shape
        torch.Size([100, 3])

    References:
        Kingma, Rezende, Mohamed and Welling (2014), *Semi-Supervised Learning with Deep Generative Models*, NeurIPS.
    """

    classifier: nn.Module
    num_classes: int

    @checked
    def __init__(
        self,
        *,
        prior: nn.Module,
        likelihood: Likelihood,
        posterior: nn.Module,
        classifier: nn.Module,
        num_classes: int,
        classifier_weight: float = 0.0,
    ) -> None:
        if not 0 <= classifier_weight < torch.inf:
            raise PyroVAEError(
                f"expected classifier_weight to be a finite number of at least 0, got {classifier_weight!r}. Try 10.0."
            )
        super().__init__(prior=prior, likelihood=likelihood, posterior=posterior, classifier=classifier)
        require_count("num_classes", num_classes, least=2)
        self.num_classes = num_classes
        self.classifier_weight = classifier_weight

    @on_own_device
    def model(self, x: Tensor, y: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The generative model p(y) p(z) p(x|z, y), as a Pyro function. It returns the value at site ``x``.

        Arguments:
            x, subsample_size: as in :meth:`VAE.model`.
            y: integer labels of shape (N,), -1 where the label is unobserved; None is -1 everywhere.
        """
        self._register("prior", "likelihood")
        with self._data(x, None, subsample_size, self._column(x, y)) as (x, observed, _):
            label = pyro.sample("y", dist.Categorical(logits=x.new_zeros(self.num_classes)))
            observed = observed[..., 0]
            if y is not None:  # for other guides, since this pair's guide proposes only the observed label
                contradicts = (observed != UNOBSERVED) & (label != observed)
                pyro.factor("label", torch.where(contradicts, IMPOSSIBLE, 0.0).to(x.dtype))
            # The classifier's mode is evaluation mode in estimates, even if other functions wrap this pair.
            if self.classifier_weight and self.classifier.training:
                self._register("classifier")
                log_q = dist.Categorical(logits=self._logits(x)).log_prob(observed.clamp(min=0))
                pyro.factor("classifier", self.classifier_weight * torch.where(observed == UNOBSERVED, 0.0, log_q))
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z, self._indicators(label, x)), obs=x)

    @on_own_device
    def guide(self, x: Tensor, y: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The approximate posterior q(y|x) q(z|x, y), as a Pyro function of the model's arguments. It returns z."""
        self._register("classifier", "posterior")
        with self._data(x, None, subsample_size, self._column(x, y)) as (x, observed, _):
            on_label = torch.where(one_hot(observed[..., 0].clamp(min=0), self.num_classes) == 1, 0.0, IMPOSSIBLE)
            logits = torch.where(observed == UNOBSERVED, self._logits(x), on_label.to(x.dtype))
            label = pyro.sample("y", dist.Categorical(logits=logits))
            return pyro.sample("z", self.posterior(x, self._indicators(label, x)))

    def check_data(self, x: Tensor, y: Tensor | None = None) -> None:
        """Raise ValueError for data of the wrong shape or type. `fit` calls this before it trains on the data."""
        self._check(x)
        self._column(x, y)

    @in_evaluation_mode
    def classify(self, x: Tensor) -> Tensor:
        """The probabilities q(y|x): (N, *event) to (N, C)."""
        self._check(x)
        return self._logits(x).softmax(-1)

    @in_evaluation_mode
    def embed(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean of q(z|x, y), of shape (N, Z), where the most probable label replaces an unobserved one."""
        return self._embed(x, self._best(x, y))

    @in_evaluation_mode
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean of p(x|z, y) at the z and the label of :meth:`embed`: (N, *event) to (N, *event)."""
        best = self._best(x, y)
        return self.decode(self._embed(x, best), best)

    def _embed(self, x: Tensor, y: Tensor) -> Tensor:
        return mean_of(self.posterior, x, self._indicators(y, x))

    def _best(self, x: Tensor, y: Tensor | None) -> Tensor:
        observed = self._column(x, y)[..., 0]
        return torch.where(observed == UNOBSERVED, self.classify(x).argmax(-1), observed)

    def _logits(self, x: Tensor) -> Tensor:
        # PyTorch's own normalisation loses digits of large logits.
        return apply_batched(self.classifier, x, len(self.event_shape)).log_softmax(-1)

    def _indicators(self, y: Tensor, like: Tensor) -> Tensor:
        return one_hot(y, self.num_classes).to(like.dtype)

    def _column(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The labels as a column (N, 1), -1 where the label is unobserved."""
        if not is_dense(x) or x.dim() == 0:
            self._check(x)  # refuses it
        if y is None:
            return torch.full((x.shape[0], 1), UNOBSERVED, device=x.device)
        if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != x.shape[:1]:
            fix = "Pass y.argmax(1)." if isinstance(y, Tensor) and y.dim() == 2 else "Pass y.long()."
            expected = f"integer labels of shape ({len(x)},), {UNOBSERVED} where unobserved"
            raise PyroVAEError(f"expected y to be {expected}, got {described(y)}. {fix}")
        check_labels(y, UNOBSERVED, self.num_classes)
        return y.long().unsqueeze(-1)
