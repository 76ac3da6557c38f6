"""What a network must offer to be trained, sampled and scored. It knows no schedule and no meaning of its output.

A network of one's own is any `torch.nn.Module` with these attributes and this `forward`; `Network` as its base class
sets the attributes. Its configuration is an option of the group `model`, as conf/model/unet.yaml.

    image_size, channels    of the images it takes: x is (B, channels, image_size, image_size)
    out_channels            of its answer: `channels`, or twice as many where it says how wide the reverse step is
    num_classes             0 for an unconditional network
    null_label              the label that means "no class", usually num_classes; None for an unconditional network
    conditioning            what it is told in `told`: "time" or "noise" (`diffusion.denoiser`); "time" if it is missing

    forward(x, told, labels=None)   x (B, C, H, W); told float32 (B,); labels int64 (B,), or None for no class;
                                    (B, out_channels, H, W)

Its arguments `image_size`, `channels`, `num_classes` and `out_channels` are given by the configuration.
"""

from torch import nn

REQUIRED = ("image_size", "channels", "out_channels", "num_classes", "null_label")


class Network(nn.Module):
    """The base class of this package's networks.

    Args:
        image_size: height and width in pixels. channels: of the images.
        num_classes: 0 for unconditional; else labels 0 ... num_classes - 1, and `null_label` = num_classes for none.
        out_channels: channels of the output, `channels` unless given.
        conditioning: what `forward` is told, "time" or "noise".
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
    """What a network must offer and this object does not; [] if it is one."""
    found = [name for name in REQUIRED if not hasattr(network, name)]
    return found if isinstance(network, nn.Module) else ["forward", *found]
