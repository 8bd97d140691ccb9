"""With Lightning: python docs/examples/with_lightning.py"""

import lightning
import torch
from digits import EPOCHS, Net, loader
from torch import Tensor

import dumo


class Model(lightning.LightningModule):
    """A checkpoint of Lightning holds the flow's step, so resumed runs draw what they would have drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = dumo.Flow(Net(), "dumo", classes=10)

    def training_step(self, batch: list[Tensor], i: int) -> Tensor:
        """The loss of a batch."""
        loss = self.flow(*batch)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self) -> None:
        """Print the mean loss."""
        print(f"epoch {self.current_epoch}: loss {self.trainer.callback_metrics['loss']:.4f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As in any loop."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lightning.seed_everything(0)
model = Model()
trainer = lightning.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(model, loader)
samples = model.flow.sample(range(10), nfe=1)
print(f"samples {tuple(samples.shape)}")
