"""One method trained on one task, in a folder of its own."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from floral_peft.cli.settings import Settings
from floral_peft.federated import FederatedArguments, FederatedDataset, FederatedTrainer, get_method
from floral_peft.federated.checkpoint import checkpoint_rounds
from floral_peft.reports import has_router, num_parameters, save_run
from floral_peft.reports.runs import RESULT


def new_trainer(
    settings: Settings, method: str, clients: FederatedDataset, args: FederatedArguments, lenient: bool
) -> FederatedTrainer:
    """A trainer for a method: the same clients and initial weights for each method.

    Args:
        settings: The task and the adaptors.
        method: The method's name.
        clients: The task's clients.
        args: How to train, and where.
        lenient: Take what the method can use of the settings: without a router it has no optimal routing, and where
            others are resumed it starts anew if its folder holds no checkpoint. Else what it cannot use is refused.
    """
    chosen = get_method(method)
    model = settings.task.model_for(chosen, settings.adaptors, args.seed)
    if lenient:
        folder = Path(args.output_dir)
        resume = bool(args.resume_from_checkpoint and checkpoint_rounds(folder))
        # Before its first checkpoint there is nothing to lose; what is done is not given up unasked.
        cut_off = bool(args.resume_from_checkpoint) and not resume and not (folder / RESULT).exists()
        args = replace(
            args,
            optimal_routing=args.optimal_routing and has_router(model),
            stateless=args.stateless and has_router(model),
            resume_from_checkpoint="true" if resume else None,
            overwrite_output_dir=args.overwrite_output_dir or cut_off,
        )
    task = settings.task
    return FederatedTrainer(model, args, clients, chosen, compute_metrics=task.compute_metrics, loss_fn=task.loss_fn)


def train_one(trainer: FederatedTrainer, settings: Settings, label: str | None = None) -> dict[str, Path]:
    """Train, evaluate, and write what belongs to a run. All processes call it; the main one writes.

    Args:
        trainer: A new trainer.
        settings: What it was made from.
        label: What the run is called in tables; by default they name it by its method and settings.

    Returns:
        What lies where, in words; nothing on other processes than the main one.
    """
    trainer.train()
    folder, method = trainer.output_dir, trainer.method.name
    if not trainer.client_metrics:  # with eval_steps, the last round has been evaluated
        trainer.evaluate()
    kind = "adapter" if hasattr(trainer.model, "save_pretrained") else "model"
    trainer.publish(folder / kind)
    base = settings.task.model_for(get_method("fedavg"), settings.adaptors, trainer.args.seed)
    written = save_run(trainer, label, settings.to_dict(method, trainer.args), num_parameters(base))
    return {**written, kind: folder / kind} if written else {}


def file_name(text: str) -> str:
    """A name that every file system takes; another one for another text."""
    plain = re.sub(r"[^\w.+=-]", "-", text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
