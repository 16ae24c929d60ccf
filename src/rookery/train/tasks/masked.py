"""Put back the hidden patches of pictures: learning without labels."""

from pathlib import Path

import torch
from torch import Tensor

from rookery.data.image_input import labelled_batches, named_input
from rookery.data.images import Images, open_images
from rookery.models import save_model
from rookery.models.mae import MaskedAutoencoder, MaskedConfig
from rookery.train.config import MaskedImageConfig
from rookery.train.tasks.base import Task
from rookery.train.tasks.images import ImageReader, starting_classifier


class MaskedTask(Task):
    """Labels of the data are not looked at; the config's model is the encoder, which is what the run leaves behind.

    A run that trains a classifier starts from it: `initial` = its model.safetensors.
    """

    def __init__(self, config: MaskedImageConfig) -> None:
        self.config = config
        if not config.data.path:
            raise ValueError("no pictures to learn from: give data.path, for example --set data.path=digits")
        train, held_out = open_images(config.data.path, 0, config.data.validation_share, config.seed)
        encoder = starting_classifier(config, train)
        encoder.reset_classifier(0)
        sizes = encoder.config
        self.held_out = Images(held_out.sources, held_out.labels, held_out.classes, sizes.in_channels)
        train = Images(train.sources, train.labels, train.classes, sizes.in_channels)
        masked = MaskedConfig(
            hidden_share=config.hidden_share, decoder_size=config.decoder_size, decoder_layers=config.decoder_layers
        )
        self.trained = MaskedAutoencoder(encoder, masked)
        self.trained.init_weights(config.seed)
        self.model = encoder
        self.want = named_input(config.data.normalise, sizes.image_size, sizes.in_channels, config.data.crop)
        self.reader = ImageReader(config, train, self.want)
        self.dtype = getattr(torch, config.dtype)

    def batch(self, step: int) -> Tensor:
        self.step = step
        return self.want.normalised(self.reader.pixels(step))

    def tokens(self, batch: Tensor) -> int:
        return len(batch) * self.model.config.grid**2

    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        self.trained.train()
        with torch.random.fork_rng():  # as in ImageTask
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            hidden = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
            return {"loss": self.trained(batch.to(self.model.pos_embed.dtype), hidden)[0]}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on the pictures that were held out; the same patches are hidden each time."""
        self.trained.eval()
        total, hidden = 0.0, torch.Generator().manual_seed(self.config.seed)
        for images, _ in labelled_batches(self.held_out, self.want, self.config.batch_size):
            total += float(self.trained(images.to(self.model.pos_embed), hidden)[0]) * len(images)
        return {"validation_loss": total / len(self.held_out)}

    def export(self, out: Path) -> None:
        save_model(self.model, out / "model.safetensors", metadata=self.want.metadata())
