"""Is this machine ready to train? Checks of packages, GPUs, memory, cores and the JPEG decoder, for tools/doctor.py."""

import io
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tools.findings import Finding, fault, ok, warning

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
DRIVER = Path("/proc/driver/nvidia/gpus")  # an entry for each GPU that NVIDIA's driver sees
SHARED_MEMORY = 2**30  # bytes of /dev/shm that NVIDIA asks for in containers
MIB, GIB = 2**20, 2**30


def installed() -> dict[str, str]:
    """Versions of all installed packages, by normalised name."""
    versions: dict[str, str] = {}
    for package in metadata.distributions():
        versions.setdefault(re.sub(r"[-_.]+", "-", package.name).lower(), package.version)
    return versions


def dali_packages(versions: Mapping[str, str]) -> dict[str, int]:
    """{installed package that brings DALI: the CUDA major version it is built for}."""
    matches = {name: re.fullmatch(r"nvidia-dali-(?:\w+-)?cuda(\d+)0", name) for name in versions}
    return {name: int(match[1]) for name, match in matches.items() if match}


def packages(versions: Mapping[str, str]) -> Finding:
    """All dependencies are installed in versions that fit, those of torchvision too; torchvision fits torch."""
    from packaging.requirements import Requirement

    project = ROOT / "pyproject.toml"
    if project.exists():
        declared = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        declared = metadata.requires("swiftclr") or []
    if "torchvision" in versions:
        declared = [*declared, *(metadata.requires("torchvision") or [])]
    shown, wrong, change = [], [], []
    for need in map(Requirement, declared):
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        dali = need.name.startswith("nvidia-dali-")  # any of its builds will do here
        name = next(iter(dali_packages(versions)), need.name) if dali else need.name
        if name in versions and need.specifier.contains(versions[name], prereleases=True):
            shown.append(f"{name} {versions[name]}")
        else:
            wrong.append(f"{name} {versions.get(name, 'is missing')}, expected {need.specifier or 'any'}")
            change.append(f"'{name}{need.specifier}'")
    if wrong:
        return fault("; ".join(dict.fromkeys(wrong)), f"pip install -U {' '.join(dict.fromkeys(change))}")
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # its compiled part, which fits one torch only
    except (RuntimeError, ImportError) as error:
        pair = f"torchvision {versions['torchvision']} does not fit torch {versions['torch']}"
        return fault(f"{pair}: {error}", "install both together: pip install -U torch torchvision")
    return ok(", ".join(dict.fromkeys(shown)))


def cuda(versions: Mapping[str, str], torch_cuda: str | None) -> Finding:
    """One DALI, built for the CUDA that torch is built for. torch_cuda is torch.version.cuda, None without CUDA."""
    dali = dali_packages(versions)
    if len(dali) > 1:
        names = " and ".join(sorted(dali))
        return fault(
            f"{names} are both installed, and own the same files",
            f"pip uninstall -y {' '.join(sorted(dali))}, then install the one for your CUDA",
        )
    ((name, major),) = dali.items()
    if torch_cuda is None:
        return ok(f"torch is built without CUDA, {name} beside it")
    if int(torch_cuda.split(".")[0]) != major:
        return fault(
            f"torch is built for CUDA {torch_cuda}, {name} for CUDA {major}",
            f"pip uninstall -y {name} && pip install nvidia-dali-cuda{torch_cuda.split('.')[0]}0",
        )
    return ok(f"torch is built for CUDA {torch_cuda}, {name} for CUDA {major}")


def devices(processes: int) -> Finding:
    """Each process has a free GPU and NCCL is there; or there is no GPU and processes run on the CPU with Gloo."""
    import torch
    import torch.distributed as dist

    backend = "NCCL" if torch.cuda.is_available() else "Gloo"
    has_backend = dist.is_available() and (dist.is_nccl_available() if backend == "NCCL" else dist.is_gloo_available())
    if processes > 1 and not has_backend:
        return fault(f"this torch has no {backend}, which {processes} processes talk through", "reinstall torch")
    if not torch.cuda.is_available():
        if DRIVER.is_dir() and any(DRIVER.iterdir()):
            return fault(
                f"this machine has a GPU, but torch {torch.__version__} cannot use it and would train on the CPU",
                "nvidia-smi shows the driver's CUDA: update it, or install a torch built for it (README, CUDA 12)",
            )
        return ok(f"no GPU: {processes} process{'es' * (processes > 1)} on the CPU")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    memory = [torch.cuda.mem_get_info(i) for i in range(len(gpus))]
    text = ", ".join(
        f"{gpu.name} ({free / GIB:.0f} of {total / GIB:.0f} GiB free)"
        for gpu, (free, total) in zip(gpus, memory, strict=True)
    )
    if processes > len(gpus):
        return fault(f"{processes} processes, but torch sees {len(gpus)} GPUs: {text}", f"--processes {len(gpus)}")
    if any(free < 0.9 * total for free, total in memory):
        return warning(text, "see in nvidia-smi which programs hold the rest")
    if len({gpu.name for gpu in gpus}) > 1:
        return warning(f"{text}: the slowest sets the pace", "choose equal ones by CUDA_VISIBLE_DEVICES")
    return ok(text + (f"; {backend} for {processes} processes" if processes > 1 else ""))


def shared_memory(processes: int, gpus: int) -> Finding:
    """Room in /dev/shm, through which NCCL passes what GPUs cannot send each other directly."""
    size = shutil.disk_usage("/dev/shm").total
    text = f"/dev/shm has {size / MIB:,.0f} MiB"
    if size >= SHARED_MEMORY:
        return ok(text)
    change = "start the container with --shm-size=1g or --ipc=host"
    if gpus and processes > 1:
        return fault(f"{text}, too little for NCCL between {processes} processes", change)
    return warning(f"{text}: enough for this, too little for several GPUs", change)


def cores(processes: int) -> Finding:
    """There are enough free cores for torch's and DALI's threads, and no environment variable wastes them."""
    from pipeline.workers import share_of_cores

    num = share_of_cores()
    share = max(1, num // processes)
    wrong, change = [], []
    if (quota := cpu_quota()) is not None and quota < 0.9 * num:
        threads = max(1, int(quota / processes))
        wrong.append(f"this container may use {quota:g} of the {num} cores that torch and DALI would start threads for")
        change.append(f"--num-threads {threads} --cpu-threads {threads}")
    if processes > num:
        wrong.append(f"{processes} processes share {num} cores")
        change.append("start fewer processes, or give the machine more cores")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        wrong.append("OMP_WAIT_POLICY=ACTIVE: torch's threads spin on the cores that DALI needs")
        change.append("unset OMP_WAIT_POLICY")
    pins = [name for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY") if os.environ.get(name, "false").lower() != "false"]
    if pins:
        wrong.append(f"{' and '.join(f'{name}={os.environ[name]}' for name in pins)} ties all threads to a few cores")
        change.append(f"unset {' '.join(pins)}")
    if (load := os.getloadavg()[0]) > 0.5 * num:
        wrong.append(f"the load is {load:.1f} on {num} cores: other programs run, and what is measured now is too slow")
        change.append("look again when they are done")
    if wrong:
        return warning("; ".join(wrong), "; ".join(change))
    return ok(f"{num} cores, {share} for each process" if processes > 1 else f"{num} cores")


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the container may use at once (a fraction is a share of time), by cgroup v2 or v1; None: no limit."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        if all((root / file).exists() for file in files):
            quota, period = " ".join((root / file).read_text() for file in files).split()
            return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


def decoder(device: "torch.device") -> Finding:
    """DALI decodes a JPEG from a shard to the same pixels as Pillow."""
    import numpy as np
    from PIL import Image

    from pipeline.loader import build_eval_loader
    from pipeline.shards import Sample
    from pipeline.views import ViewConfig
    from pipeline.write import write_shards

    size = 64
    y, x = np.mgrid[:size, :size] / size
    drawn = 127.5 + 100 * np.stack([np.sin(6 * x), np.cos(5 * y), np.sin(4 * (x + y))], -1)
    file = io.BytesIO()
    Image.fromarray(drawn.astype(np.uint8)).save(file, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_shards([Sample("drawn", data=file.getvalue())], Path(folder) / "set", classes=None)
        views = ViewConfig(size=size, mean=(0.0,) * 3, std=(1.0,) * 3, eval_crop=1.0)
        images, _ = next(build_eval_loader(dataset, views, 1, device, num_threads=1))
    with Image.open(file) as image:
        expected = np.asarray(image, np.float32)
    difference = np.abs(255 * images[0].float().cpu().numpy().transpose(1, 2, 0) - expected).mean()
    where = "the GPU" if device.type == "cuda" else "the CPU"
    text = f"DALI on {where} decodes a JPEG {difference:.2f} levels of 255 from Pillow's"
    if difference > 2:
        return fault(text, "reinstall DALI, pip install --force-reinstall nvidia-dali-cuda..., and pillow")
    return ok(text)


def available_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of host memory that programs may still take; a container's limit counts as if nothing were in use."""
    free = int(psutil.virtual_memory().available)
    text = limit.read_text().strip() if limit.exists() else "max"
    return free if text == "max" else min(free, int(text))
