"""The interface of a network: what it must offer to be trained, sampled and scored.

A network knows no schedule and does not know what its output means. Any `torch.nn.Module` with these attributes and
this `forward` can be used; the base class `Network` sets the attributes. To configure your own network, add an option
to the group `model`, like conf/model/unet.yaml.

    image_size, channels    the images it takes: x is (B, channels, image_size, image_size)
    out_channels            channels of the output: `channels`, or 2 * `channels` if it learns the variance
    num_classes             number of classes; 0 for an unconditional network
    null_label              the label that means "no class", usually num_classes; None for an unconditional network
    conditioning            the meaning of `conditioning_value`: "time" (the default) or "noise" (`diffusion.denoiser`)

    forward(x, conditioning_value, labels=None) -> (B, out_channels, H, W)
        x (B, C, H, W); conditioning_value float32 (B,); labels int64 (B,), or None for no class

The configuration passes the arguments `image_size`, `channels`, `num_classes` and `out_channels`.
"""

from torch import nn

REQUIRED = ("image_size", "channels", "out_channels", "num_classes", "null_label")


class Network(nn.Module):
    """The base class of this package's networks.

    Args:
        image_size: height and width in pixels.
        channels: channels of the images.
        num_classes: 0 for an unconditional network. Otherwise labels are 0 ... num_classes - 1, and `null_label` =
            num_classes means "no class".
        out_channels: channels of the output; the default is `channels`.
        conditioning: the meaning of `conditioning_value` in `forward`: "time" or "noise".
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int = 0,
        out_channels: int | None = None,
        conditioning: str = "time",
    ) -> None:
        super().__init__()
        self.image_size, self.channels, self.num_classes = image_size, channels, num_classes
        self.out_channels, self.conditioning = out_channels or channels, conditioning

    @property
    def null_label(self) -> int | None:
        """The label that means "no class"; None for an unconditional network."""
        return self.num_classes or None


def lacking(network: object) -> list[str]:
    """Names of the attributes that a network needs and this object does not have; [] if it is a network."""
    found = [name for name in REQUIRED if not hasattr(network, name)]
    return found if isinstance(network, nn.Module) else ["forward", *found]
