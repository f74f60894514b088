"""The engine's side: isolation state is saved and loaded with its own checkpoints, and vouched for together."""

from __future__ import annotations

from epi_ds.zero3.persistence.loading import LoadingMixin
from epi_ds.zero3.persistence.saving import SavingMixin


class IsolationEngineMixin(SavingMixin, LoadingMixin):
    """Mixed over the class of a DeepSpeed engine; ``epi`` is set when the class is assigned."""

    def destroy(self) -> None:
        """End the engine: another one of the process may have its place in the folders that it saved in."""
        if "epi" in vars(self):
            self.epi.run.leave()
        super().destroy()
