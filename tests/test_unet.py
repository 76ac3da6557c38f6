"""The paper's network: its size, and the same numbers as diffusers' network with the same weights."""

import re

import pytest
import torch

from diffusion.models.unet import ResBlock, UNet

SIZES = {
    "cifar10": (dict(image_size=32, dropout=0.1), 35_746_307),
    "celeba_64": (dict(image_size=64, multipliers=(1, 2, 2, 2, 4)), 78_700_803),
    "256": (dict(image_size=256, multipliers=(1, 1, 2, 2, 4, 4)), 113_673_219),
    "256 large": (dict(image_size=256, width=192, multipliers=(1, 1, 2, 2, 4, 4)), 255_677_955),
}


@pytest.mark.parametrize("settings, count", SIZES.values(), ids=SIZES)
def test_parameter_count_is_the_papers(settings, count):
    with torch.device("meta"):
        network = UNet(**settings)
    assert sum(p.numel() for p in network.parameters()) == count


def test_labels_add_an_embedding_row_per_class_and_one_for_none():
    with torch.device("meta"):
        network = UNet(**SIZES["cifar10"][0], num_classes=10)
    assert sum(p.numel() for p in network.parameters()) == 35_746_307 + 11 * 512
    assert network.null_label == 10


def ours_of(name: str) -> str:
    """The name of diffusers' parameter in our network."""
    name = re.sub(r"time_embedding\.linear_(\d)", r"time.dense_\1", name)
    name = re.sub(r"^conv_in", "stem", name)
    name = re.sub(r"^conv_norm_out", "norm", name)
    name = re.sub(r"^conv_out", "head", name)
    name = re.sub(r"^(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.blocks.\3.res", name)
    name = re.sub(r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)", r"\1.\2.blocks.\3.attention", name)
    name = re.sub(r"^(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv", r"\1.\2.resample.conv", name)
    name = re.sub(r"^mid_block\.resnets\.0", "middle_1.res", name)
    name = re.sub(r"^mid_block\.attentions\.0", "middle_1.attention", name)
    name = re.sub(r"^mid_block\.resnets\.1", "middle_2.res", name)
    name = name.replace("time_emb_proj", "project").replace("conv_shortcut", "shortcut")
    name = re.sub(r"\.(norm|conv)([12])\.", r".\1_\2.", name)
    name = name.replace("group_norm", "norm").replace("to_out.0", "out")
    return re.sub(r"\.to_([qkv])\.", r".\1.", name)


def copy_weights(theirs, ours: UNet) -> None:
    """Random weights of a size that keeps activations of order 1, the same in both."""
    generator = torch.Generator().manual_seed(0)
    target = dict(ours.named_parameters())
    for name in [n for n in target if ".qkv." in n]:  # one matrix where theirs are three
        for letter, part in zip("qkv", target.pop(name).chunk(3), strict=True):
            target[name.replace("qkv", letter)] = part
    for name, weight in theirs.named_parameters():
        if weight.ndim > 1:
            value = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
        else:
            value = 0.2 * torch.randn(weight.shape, generator=generator) + ("norm" in name and name.endswith("weight"))
        mine = target.pop(ours_of(name))
        with torch.no_grad():
            weight.copy_(value)
            mine.copy_(value.reshape(mine.shape))
    assert not target, f"no counterpart for {list(target)[:3]}"


def google_config(channels, attention_level, image_size):
    """The configuration of google/ddpm-cifar10-32 and of google/ddpm-{church,cat,bedroom,celebahq}-256."""
    levels = len(channels)
    down = ["AttnDownBlock2D" if i == attention_level else "DownBlock2D" for i in range(levels)]
    up = ["AttnUpBlock2D" if levels - 1 - i == attention_level else "UpBlock2D" for i in range(levels)]
    return dict(
        sample_size=image_size, in_channels=3, out_channels=3, block_out_channels=channels, down_block_types=down,
        up_block_types=up, layers_per_block=2, norm_num_groups=32, norm_eps=1e-6, act_fn="silu",
        mid_block_scale_factor=1, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, attention_head_dim=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings, config",
    [
        (SIZES["cifar10"][0], google_config((128, 256, 256, 256), 1, 32)),
        pytest.param(SIZES["256"][0], google_config((128, 128, 256, 256, 512, 512), 4, 256), marks=pytest.mark.slow),
    ],
    ids=["cifar10", "256"],
)
def test_same_output_as_diffusers(settings, config):
    from diffusers import UNet2DModel

    theirs, ours = UNet2DModel(**config).eval(), UNet(**settings).eval()
    copy_weights(theirs, ours)
    x = torch.randn(1, 3, settings["image_size"], settings["image_size"], generator=torch.Generator().manual_seed(1))
    for t in (0, 17, 999):
        with torch.no_grad():
            expected = theirs(x, t).sample
            got = ours(x, torch.tensor([float(t)]))
        assert expected.std() > 0.1  # the comparison is of numbers, not of zeros
        assert (got - expected).abs().max() <= 1e-4


def test_initial_output_is_nearly_zero_and_of_the_images_shape():
    network = UNet(image_size=8, channels=1, width=32, multipliers=(1, 2), attention_resolutions=(4,), num_classes=10)
    x = torch.randn(2, 1, 8, 8)
    output = network(x, torch.tensor([0.0, 999.0]), torch.tensor([3, 10]))
    assert output.shape == x.shape
    assert output.abs().max() < 1e-3


def test_no_labels_means_the_null_label():
    network = UNet(image_size=8, channels=1, width=32, multipliers=(1, 2), num_classes=10)
    torch.nn.init.normal_(network.head.weight)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([5.0, 50.0, 500.0])
    assert torch.equal(network(x, t), network(x, t, torch.full((3,), 10)))
    assert not torch.equal(network(x, t), network(x, t, torch.full((3,), 1)))


@pytest.mark.parametrize(
    "wrong, key",
    [
        (dict(width=48), "model.width"),
        (dict(multipliers=(1, 2, 2, 2, 2)), "model.multipliers"),
        (dict(dropout=1.0), "model.dropout"),
    ],
)
def test_wrong_sizes_are_refused_by_name(wrong, key):
    with pytest.raises(ValueError, match=key):
        UNet(**(dict(image_size=8, width=32, multipliers=(1, 2)) | wrong))


def test_every_residual_block_sees_the_time():
    network = UNet(image_size=8, channels=1, width=32, multipliers=(1, 2), attention_resolutions=(4,), num_classes=10)
    for module in network.modules():
        if isinstance(module, ResBlock):
            torch.nn.init.xavier_uniform_(module.conv_2.weight)
            h = torch.randn(2, module.norm_1.num_channels, 8, 8)
            one, other = (module(h, torch.randn(2, 128)) for _ in range(2))
            assert (one - other).std() > 0.1 * one.std()


# ---- activation checkpointing ----

SMALL = dict(image_size=16, channels=1, width=32, multipliers=(1, 2), attention_resolutions=(8,), num_classes=10)


def ordinary_weights(network: UNet) -> UNet:
    """None of the paper's zeros, so that every weight has a say in the output and in the gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
    return network


def loss_and_gradients(network, steps: int = 1):
    """A loss over random images and what it gives every parameter, dropout drawn from one seed; [loss, gradients]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 16, 16, generator=generator)
    torch.manual_seed(2)
    found = []
    for _ in range(steps):
        network.zero_grad()
        loss = (network(x, torch.tensor([0.0, 1, 500, 999]), torch.tensor([0, 3, 9, 10])) - x).square().mean()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in network.parameters())]
    return found + [torch.rand(3)]  # the generator stands where it would stand without


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_checkpointing_changes_no_bit_of_loss_and_gradients_with_dropout(bf16):
    plain, saving = (
        ordinary_weights(UNet(**SMALL, dropout=0.3, activation_checkpointing=on)).train() for on in (False, True)
    )
    assert plain.state_dict().keys() == saving.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected, got = loss_and_gradients(plain, steps=2), loss_and_gradients(saving, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    first, second = (expected[i * len(expected) // 2] for i in (0, 1))
    assert first != second  # by dropout alone, which so has an effect


def kept_bytes(network: UNet) -> int:
    """Bytes of activations that are held when the backward pass begins: what autograd has saved, and the outputs of
    the network's parts, which checkpointing holds as the inputs of the next."""
    held: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = tensor  # kept, so that no other storage comes to lie there
        return tensor

    parts = [*network.down, *network.up]
    parts = [part for level in parts for part in (*level.blocks, level.resample) if part is not None]
    for part in (network.stem, network.middle_1, network.middle_2, *parts):
        part.register_forward_hook(lambda module, inputs, output: hold(output))
    x = torch.randn(4, 1, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        network(x, torch.arange(4.0), torch.arange(4)).square().mean()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_checkpointing_keeps_less_than_a_quarter_of_the_activations():
    plain, saving = (
        kept_bytes(UNet(**SMALL, dropout=0.3, activation_checkpointing=on).train()) for on in (False, True)
    )
    assert saving < plain / 4, f"{saving:,} bytes with checkpointing, {plain:,} without"


def test_without_gradients_nothing_is_computed_for_a_second_time(monkeypatch):
    network = UNet(**SMALL, activation_checkpointing=True)
    monkeypatch.setattr("diffusion.models.unet.checkpoint", None)  # not called
    x, t = torch.randn(1, 1, 16, 16), torch.zeros(1)
    with torch.no_grad():
        network.train()(x, t)
    network.eval()(x, t)
    with pytest.raises(TypeError):
        network.train()(x, t)


@pytest.mark.parametrize("kind", ["static_graph", "find_unused_parameters"])
def test_checkpointing_works_under_ddp(kind, tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    network = ordinary_weights(UNet(**SMALL, dropout=0.3, activation_checkpointing=True)).train()
    expected = loss_and_gradients(network, steps=3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(network, gradient_as_bucket_view=True, **{kind: True})
        got = loss_and_gradients(parallel, steps=3)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
