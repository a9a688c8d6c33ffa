"""A mixture of C full models: each example of a client has a posterior over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from floral_peft.federated import Arrival, Arrived, FederatedArguments, Group, Turn, register_method
from floral_peft.federated.batches import Batch
from floral_peft.federated.forward import Forward, LossFunction, Prediction, is_classification
from floral_peft.methods.ensemble import ENSEMBLE, EnsembleMethod
from floral_peft.tuner import Ensemble, Role, mixed


@register_method
class FedEM(EnsembleMethod):
    """FedEM (Marfoq et al., NeurIPS 2021, arXiv 2108.10252, algorithm 1): clients mix C distributions.

    The loss of an example under model c is f_c = −log p_c(y|x), up to a constant. Whenever a client is visited, it
    finds the posteriors q_c ∝ π_c exp(−f_c) of its training examples (E step), and their mean, which is its new π.
    Local steps minimise −log Σ_c π_c exp(−f_c), whose gradient is Σ_c q_c ∇f_c, that of the M step; only that q
    follows π and the models from step to step, where in the paper it stays that of the E step. The models are averaged
    with p(k), as there: a client that does not use a model returns it as it was. π never leaves the client.

    A client predicts with Σ_c π_c p_c(y|x), or Σ_c π_c f_c(x) where the outputs are no classifier's; its eval_loss is
    the mixture's negative log-likelihood. `optimal_routing` fixes π.
    """

    name = "fedem"

    def group(self, name: str, role: Role) -> Group:
        """The models are shared, the router is private."""
        return "private" if role.kind == "router" else "shared"

    def forward(self, model: nn.Module, loss_fn: LossFunction | None) -> Forward:
        """The mixture's likelihood and predictions."""
        if not isinstance(model, Ensemble):
            raise TypeError(f'method "{self.name}" got a {type(model).__name__}; it needs {ENSEMBLE}')
        return MixtureForward(model, loss_fn)

    def arrival(self, args: FederatedArguments) -> Arrival | None:
        """One step of expectation and maximisation for π, unless it is known."""
        return None if args.optimal_routing else mean_posterior


class MixtureForward(Forward):
    """Calls all models of an ensemble, and mixes what they say of each example.

    Args:
        model: The ensemble.
        loss_fn: Loss of one model's outputs and the labels.
    """

    discounts_labels = False

    def __init__(self, model: Ensemble, loss_fn: LossFunction | None = None) -> None:
        super().__init__(model.members[0], loss_fn)
        self._ensemble = model
        self._each = [Forward(member, loss_fn) for member in model.members]

    def __call__(self, batch: Batch) -> Prediction:
        """The mixture's mean negative log-likelihood, and its predictions: log-probabilities for a classifier."""
        labels = self.labels(batch)
        outputs = [forward.outputs(batch) for forward in self._each]
        mixture = self._ensemble.router.mixture("default", 0)  # (1, C)
        losses = self._example_losses(outputs, labels)
        loss = -(mixture.log().view(-1, 1) - losses).logsumexp(dim=0).mean()
        if not is_classification(outputs[0], labels):
            return Prediction(loss, mixed(dict(enumerate(outputs)), mixture), labels)
        log_probabilities = torch.stack(outputs).log_softmax(dim=-1)  # (C, examples, classes)
        return Prediction(loss, (mixture.log().view(-1, 1, 1) + log_probabilities).logsumexp(dim=0), labels)

    def losses(self, batch: Batch) -> Tensor:
        """f_c, the loss of each example under each model, (C, examples)."""
        return self._example_losses([forward.outputs(batch) for forward in self._each], self.labels(batch))

    def _example_losses(self, outputs: list[Tensor], labels: Tensor) -> Tensor:
        if not all(isinstance(output, Tensor) for output in outputs):
            raise ValueError(
                "fedem needs the loss of each example: models that return a tensor, and a loss_fn for it."
            )

        def loss(output: Tensor, label: Tensor) -> Tensor:
            return self.predict(output.unsqueeze(0), label.unsqueeze(0)).loss

        return torch.stack([torch.func.vmap(loss)(output, labels) for output in outputs])


def mean_posterior(turn: Turn) -> Arrived:
    """The client's private tensors with π_c ← the mean of q_c over its training examples."""
    if not turn.num_examples:
        return Arrived(turn.private)
    mixture = turn.routers.mixture_of(turn.private[turn.routers.name])

    def posteriors(batch: Batch, count: int) -> Tensor:
        losses = turn.forward.losses(batch)
        return (mixture.to(losses).log().view(-1, 1) - losses).softmax(dim=0).sum(dim=1)

    found = turn.finite(turn.total(posteriors))
    return Arrived(turn.with_logits(turn.routers.of_mixture(found / turn.num_examples)))
