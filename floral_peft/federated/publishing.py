"""What a run gives away: one client's model to that client, and to everybody what the clients trained together."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import save_model
from torch import nn

from floral_peft.federated.adaptors import Adaptors
from floral_peft.federated.card import write_model_card
from floral_peft.federated.dataset import FederatedDataset
from floral_peft.federated.method import Method
from floral_peft.federated.processes import Message, Processes
from floral_peft.federated.records import Record
from floral_peft.federated.seeding import ClientId
from floral_peft.federated.visitor import Visitor
from floral_peft.tuner import Ensemble, Exported, ExportKind, FloralModel, check_free, export_client, save_plain


class Publishing:
    """Mixin of a trainer: `export`, `publish` and `push_to_hub`."""

    model: Any
    method: Method
    dataset: FederatedDataset
    processes: Processes
    _visitor: Visitor
    _adaptors: Adaptors

    if TYPE_CHECKING:

        @property
        def records(self) -> list[Record]:
            """The run's records."""

        def _visit(self) -> AbstractContextManager[None]: ...

        def _evaluated_as(self, client_id: ClientId) -> AbstractContextManager[None]: ...

    def export(
        self, client: ClientId, folder: str | Path, kind: ExportKind = "auto", rank: int | None = None
    ) -> Exported:
        """Write one client's model, as it is evaluated, for use without this package.

        ```python
        trainer.export("hamlet", "hamlet")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "hamlet")
        ```

        Args:
            client: One of the dataset's clients, or another that the model has a router for.
            folder: Where to; it is made. What is in it is the client's.
            kind: `"merged"`: a plain model. `"lora"`: a plain adapter of PEFT's LoRA. `"auto"`: a LoRA where the base
                is what it was, else merged. See [`export_client`][floral_peft.tuner.export_client].
            rank: Cut a LoRA's layers off at this rank; None: it is exact.

        Returns:
            The kind that was written, and a LoRA's errors by layer.

        Raises:
            ValueError: There is no such client, or what was asked for cannot hold its model.
        """
        known = client in self.dataset

        def write() -> Message:
            if not known:
                exported = export_client(self.model, folder, client, kind, rank)
            else:
                with self._evaluated_as(client):
                    exported = export_model(self.method.deployed(self.model), Path(folder), kind, rank)
            return list(exported), {}

        if not known:
            return Exported(*self.processes.on_main(write)[0])
        with self._visit():
            return Exported(*self.processes.on_main(write)[0])

    def publish(self, folder: str | Path) -> None:
        """Save what the clients trained together, with no client's router or other private tensor, and a model card.

        A FLORAL adapter is loaded by `PeftModel.from_pretrained`, and holds a router that mixes evenly, nobody's;
        `model.fit_router` finds a client's own. The card (README.md) tells this and the last evaluation's figures.

        Args:
            folder: Where `save_pretrained` writes (for a plain `nn.Module`: where `model.safetensors` goes).
        """
        with self._visit():
            self.processes.on_main(lambda: self._publish(Path(folder), Path(folder).name))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """[`publish`][FederatedTrainer.publish] on the Hub. Arguments are those of PEFT's `push_to_hub`.

        (The model's own `push_to_hub` uploads all that the model holds, clients' routers too.)

        Args:
            repo_id: The repository; it is made if it is not there.
            commit_message: The commit's first line.
            commit_description: The rest of its message.
            private: Whether a new repository is private; None: as the owner's default says.
            token: A token for the Hub; None: the one of this machine.
            revision: The branch; it is made if it is not there.
            create_pr: Open a pull request instead.

        Returns:
            The commit's URL.
        """

        def upload() -> Message:
            api = HfApi(token=token)
            repo = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo, branch=revision, exist_ok=True)
            with TemporaryDirectory() as folder:
                self._publish(Path(folder), repo)
                commit = api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                )
            return str(commit.commit_url), {}

        with self._visit():
            return str(self.processes.on_main(upload)[0])

    def _publish(self, folder: Path, name: str) -> None:
        """Write the model, which is visited, without any client's tensors."""
        self._visitor.load(self._adaptors.untrained)
        if hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(str(folder))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(folder / "model.safetensors"))
        write_model_card(folder, name, self.model, self.method.name, len(self.dataset), self.records)


def export_model(model: nn.Module, folder: Path, kind: ExportKind = "auto", rank: int | None = None) -> Exported:
    """Write the model that a client uses: one with FLORAL adaptors (`export_client`), or any other, as it is.

    Args:
        model: The model. It holds the client's tensors.
        folder: Where to.
        kind: As of `export_client`.
        rank: As of `export_client`.

    Raises:
        ValueError: What was asked for cannot hold the model.
    """
    if isinstance(model, Ensemble) or isinstance(getattr(model, "base_model", None), FloralModel):
        return export_client(model, folder, None, kind, rank)
    if isinstance(model, PeftModel):  # of another method, which needs nothing of this package
        if kind == "merged" or rank is not None:
            raise ValueError(
                'the model is one of PEFT\'s own, which is exported as it is (kind="auto"): merge it with '
                "`PeftModel.from_pretrained(base, folder).merge_and_unload()`."
            )
        check_free(folder, "lora")
        model.save_pretrained(str(folder))
        return Exported("lora", {})
    if kind == "lora" or rank is not None:
        raise ValueError('the model has no adaptors, so there is no LoRA to export: kind="merged".')
    check_free(folder, "merged")
    save_plain(model, folder)
    return Exported("merged", {})
