"""How fast is a training step compared with the same network in PyTorch?

    pip install torch
    python experiments/pytorch.py --dataset muscle_us --patch-shape 128,128 --batch-size 4

takes the options of train.py, except for --strategy and what changes the network's parts. PyTorch's
network is built with `torch.nn` from ours and holds the same weights; their logits are compared before
anything is timed. Its step is that of `diff`: noise, network, loss, gradient, clipping, AdamW, without
augmentation and history of losses; ours is the whole step. PyTorch runs as it is ("eager") and after
torch.compile ("compiled"), with channels first or last in memory. Each of them has a process of its own,
since ours was a third slower in one process with PyTorch; they take turns, on the same device, in the same
precision (bfloat16 is torch.autocast's), on a CPU with as many threads, and all keep their memory. speed.py
step --help explains the columns; PyTorch's memory is the most that it held, and is known on a GPU alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from speed import case_of, made_up_batch, matrix_product, show, training

import train
import unet
from diffusion import key_for, make_schedule
from support.command_line import check_counts, described
from support.files import InputError, program
from support.machine import ignore_absent_tpu, keep_memory

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:  # main says so, once it has read the command line
    torch, nn = None, SimpleNamespace(Module=object)

# --- The network, in PyTorch --------------------------------------------------------------------


def weight(array: jax.Array, *axes: int) -> nn.Parameter:
    """A copy of one of our arrays, with its axes in PyTorch's order."""
    return nn.Parameter(torch.tensor(np.transpose(np.asarray(array), axes or range(array.ndim))))


def convolution(ours: unet.Conv | unet.Down | unet.Up) -> nn.Module:
    """One of our convolutions: 3^n with padding, or as large as its stride, down or up."""
    kernel, dims = ours.kernel, ours.kernel.ndim - 2
    if isinstance(ours, unet.Up):
        c_in, *size, c_out = kernel.shape
        theirs = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2](c_in, c_out, size, size, bias=False)
        theirs.weight = weight(kernel, 0, dims + 1, *range(1, dims + 1))
        return theirs
    *size, c_in, c_out = kernel.shape
    stride, padding = (1, 1) if isinstance(ours, unet.Conv) else (size, 0)
    theirs = (nn.Conv2d, nn.Conv3d)[dims - 2](c_in, c_out, size, stride, padding, bias=False)
    theirs.weight = weight(kernel, dims + 1, dims, *range(dims))
    return theirs


def linear(ours: unet.Linear) -> nn.Linear:
    theirs = nn.Linear(*ours.kernel.shape)
    theirs.weight, theirs.bias = weight(ours.kernel, 1, 0), weight(ours.bias)
    return theirs


class Norm(nn.Module):
    """Our norm over the voxels of an example."""

    def __init__(self, ours: unet.Norm):
        super().__init__()
        self.scale, self.shift = weight(ours.scale), weight(ours.shift)

    def forward(self, x):
        return F.instance_norm(x, weight=self.scale, bias=self.shift, eps=1e-5)


def layer_norm(ours: unet.Norm) -> nn.LayerNorm:
    theirs = nn.LayerNorm(len(ours.scale), eps=1e-5)
    theirs.weight, theirs.bias = weight(ours.scale), weight(ours.shift)
    return theirs


def gelu(x):
    return F.gelu(x, approximate="tanh")


class ResBlock(nn.Module):
    def __init__(self, ours: unet.ResBlock):
        super().__init__()
        self.conv_1, self.norm_1 = convolution(ours.conv_1), Norm(ours.norm_1)
        self.conv_2, self.norm_2 = convolution(ours.conv_2), Norm(ours.norm_2)
        self.time = linear(ours.time)

    def forward(self, x, embedding):
        y = self.norm_1(self.conv_1(x))
        y = y + self.time(gelu(embedding)).reshape(*y.shape[:2], *(1,) * (y.ndim - 2))
        return gelu(x + self.norm_2(self.conv_2(gelu(y))))


class TransformerLayer(nn.Module):
    def __init__(self, ours: unet.TransformerLayer):
        super().__init__()
        self.position = weight(ours.position.reshape(-1, ours.position.shape[-1]))
        self.norm_1, self.norm_2 = layer_norm(ours.norm_1), layer_norm(ours.norm_2)
        self.query_key_value, self.out = linear(ours.query_key_value), linear(ours.out)
        self.mlp_1, self.mlp_2, self.heads = linear(ours.mlp_1), linear(ours.mlp_2), ours.heads

    def forward(self, x):
        shape = x.shape
        x = x.flatten(2).transpose(1, 2) + self.position
        parts = self.query_key_value(self.norm_1(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp_2(gelu(self.mlp_1(self.norm_2(x))))
        return x.transpose(1, 2).reshape(shape)


class UNet(nn.Module):
    """The network of unet.py, for patches whose size is a multiple of the strides."""

    def __init__(self, ours: unet.UNet):
        super().__init__()
        self.stem, self.stem_norm = convolution(ours.stem), Norm(ours.stem_norm)
        self.down = nn.ModuleList(nn.ModuleList(map(ResBlock, blocks)) for blocks in ours.down)
        self.up = nn.ModuleList(nn.ModuleList(map(ResBlock, blocks)) for blocks in ours.up)
        self.bottom_1, self.bottom_2 = ResBlock(ours.bottom_1), ResBlock(ours.bottom_2)
        self.transformer = TransformerLayer(ours.transformer)
        self.down_sample = nn.ModuleList(
            nn.Sequential(convolution(conv), Norm(norm)) for conv, norm in ours.down_sample
        )
        self.up_sample = nn.ModuleList(
            nn.Sequential(convolution(conv), Norm(norm)) for conv, norm in ours.up_sample
        )
        self.head = linear(ours.head)
        frequency = np.exp(-np.log(10_000) * np.arange(ours.time_dim // 2) / (ours.time_dim // 2))
        self.register_buffer("frequency", torch.tensor(frequency, dtype=torch.float32))
        self.T = ours.T

    def forward(self, image, t, x_t):
        """Logits, with channels first like all arrays here."""
        angle = t[:, None].float() / self.T * 10_000 * self.frequency
        embedding = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
        x = gelu(self.stem_norm(self.stem(torch.cat([image, x_t], dim=1))))
        skips = [x]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x, embedding)
                skips.append(x)
            if level < len(self.down_sample):
                x = self.down_sample[level](x)
                skips.append(x)
        x = self.bottom_2(self.transformer(self.bottom_1(x, embedding)), embedding)
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:
                x = block(x + skips.pop(), embedding)
            if level > 0:
                x = self.up_sample[level - 1](x)
        return self.head(x.movedim(1, -1)).movedim(-1, 1)


# --- The step, in PyTorch -----------------------------------------------------------------------


class InTurn:
    """What `Timed` is for a compiled program, for PyTorch in another process, which starts at once."""

    flops = temporaries = 0

    def __init__(self, form: str, layout: str, settings: list[str]):
        self.name, self.times = f"PyTorch, {form}, channels {layout}", []
        processes = multiprocessing.get_context("spawn")
        self.steps, theirs = processes.Pipe()
        processes.Process(target=serve, args=(theirs, form, layout, settings), daemon=True).start()
        theirs.close()

    def check(self, limit: float) -> None:
        """Raises InputError where its logits differ from ours by more than `limit`."""
        apart = self.received()
        print(f"{self.name}: logits differ by {apart:.1e} of the largest", flush=True)
        if not apart < limit:
            raise InputError("the network of this script is not that of unet.py any more; adapt it")

    def run(self) -> float:
        """Seconds of one step."""
        self.steps.send("step")
        seconds, self.temporaries = self.received()
        return seconds

    def received(self) -> float | tuple[float, int]:
        """What the other process says. Raises InputError where it has ended."""
        try:
            return self.steps.recv()
        except EOFError:
            raise InputError(f"{self.name}: its process has ended; it says above why") from None


def device_here() -> str:
    """PyTorch's name of the device that JAX uses."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def loss_of(logits, x_0):
    """20 x cross entropy + soft Dice loss of the foreground classes in the truth."""
    truth = (x_0 + 1) / 2
    entropy = -(truth * F.log_softmax(logits, dim=1)).sum(1).mean()
    p, g = F.softmax(logits, dim=1)[:, 1:].flatten(2), truth[:, 1:].flatten(2)
    present = g.sum(2) > 0
    dice = 2 * (p * g).sum(2) / torch.where(present, (p + g).sum(2), 1)
    of_example = torch.where(present, 1 - dice, 0).sum(1) / present.sum(1).clamp(min=1)
    return 20 * entropy + of_example.mean()


def serve(steps: Connection, form: str, layout: str, settings: list[str]) -> None:
    """Makes the step of `diff`, sends how far its logits are from ours, and then takes a step, and sends its
    seconds and the most memory held so far, whenever it is asked. The first step, which compiles, is not
    timed."""
    keep_memory()
    config, device = train.parse_config(settings)[0], device_here()
    precision = torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16")
    case = case_of(config)
    batch = made_up_batch(case._replace(canvas=config.patch_shape), config.batch_size)
    last = torch.channels_last if len(config.patch_shape) == 2 else torch.channels_last_3d
    memory = {"memory_format": torch.contiguous_format if layout == "first" else last}
    image = torch.tensor(np.asarray(batch.image), device=device).movedim(-1, 1).contiguous(**memory)
    label = torch.tensor(np.asarray(batch.label), device=device).long()
    x_0 = (2 * F.one_hot(label, case.classes).movedim(-1, 1).float() - 1).contiguous(**memory)
    ours = train.make_network(config, case.image_channels, case.classes, key_for("weights", 0))
    network = UNet(ours).to(device, **memory)
    with precision:
        steps.send(difference(ours, network, image[:1], x_0[:1]))

    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(network.parameters(), fused=True, **rates)
    schedule = make_schedule(config.schedule, config.train_timesteps)
    alpha_bar = torch.tensor(np.asarray(schedule.alpha_bar), device=device)

    def loss(t, noise):
        share = alpha_bar[t].reshape(-1, *(1,) * (x_0.ndim - 1))
        x_t = share.sqrt() * x_0 + (1 - share).sqrt() * noise  # (3a)
        with precision:
            logits = network(image, t, x_t)
        return loss_of(logits.float(), x_0)

    if form == "compiled":
        loss = torch.compile(loss)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        t = torch.randint(1, len(alpha_bar), (len(x_0),), device=device)
        loss(t, torch.randn_like(x_0)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()

    step()
    with suppress(EOFError):  # the other end is closed
        while steps.recv():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            steps.send((seconds, torch.cuda.max_memory_allocated() if device == "cuda" else 0))


def difference(ours: unet.UNet, theirs: UNet, image, x_0) -> float:
    """How far the logits of the two networks are apart, relative to the largest."""
    t = torch.full((len(image),), 300, device=image.device)
    with torch.no_grad():
        logits = theirs(image, t, x_0).movedim(1, -1).float().cpu().numpy()
    given = [jnp.asarray(x.movedim(1, -1).cpu().numpy()) for x in (image, x_0)]
    expected = np.asarray(jax.jit(jax.vmap(ours))(given[0], jnp.asarray(t.cpu().numpy()), given[1]))
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, **described(__doc__))
    parser.add_argument("--repeats", type=int, default=5, help="How often each program is run. Default: 5.")
    forms = "eager-first,compiled-last"
    parser.add_argument("--forms", default=forms, help=f"Of PyTorch, with the layout. Default: {forms}.")
    args, more = parser.parse_known_args()
    check_counts(parser, args, repeats=1)
    forms = [form.partition("-")[::2] for form in args.forms.split(",")]
    if not set(forms) <= set(product(("eager", "compiled"), ("first", "last"))):
        parser.error("--forms: each is eager or compiled, then -first or -last")
    settings = [*more, "--strategy", "diff"]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same GPU
    ignore_absent_tpu()
    keep_memory()
    with program():
        if torch is None:
            raise InputError("PyTorch is missing; install it with: pip install torch")
        if device_here() == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"JAX uses a {jax.default_backend()} here, and PyTorch finds no GPU; install PyTorch for it, "
                "or set JAX_PLATFORMS=cpu to compare both on the CPU"
            )
        config = train.parse_config(settings)[0]
        total = np.prod(config.strides, axis=0)
        if not (config.transformer and config.time_dim) or config.prediction != "x_0":
            raise InputError("this script knows a network with Transformer and time that predicts x_0 alone")
        if any(np.array(config.patch_shape) % total):
            raise InputError(f"--patch-shape: each size must be a multiple of the strides, {total.tolist()}")
        theirs = [InTurn(*form, settings) for form in forms]
        ours = training(config, case_of(config))
        for other in theirs:
            other.check({"float32": 1e-3, "bfloat16": 0.05}[config.dtype])
            other.flops = ours.flops
        show(config, [matrix_product(config.dtype), ours, *theirs], args.repeats, more)


if __name__ == "__main__":
    main()
