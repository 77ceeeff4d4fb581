"""Boots Linux on a processor that Bochs emulates: test_processors.py uses it for AVX-512.

qemu emulates no AVX-512, so it cannot show whether a program for Skylake-Server runs there. Bochs
does, but emulates a whole machine: it boots Debian's kernel from a CD, whose initial file system
holds Python and the files to test. Both, and Bochs, are of the Debian that has a Bochs new enough;
its packages are unpacked into a folder, and nothing of them is installed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
import tty
from dataclasses import dataclass
from pathlib import Path

from build_wheels import BUILD, run

DEBIAN = "trixie"
PYTHON = "3.13"
# What runs in the machine; the rest of what debootstrap fetches runs here.
GUEST = ["busybox-static", "libbz2-1.0", "libc6", "libexpat1", "libffi8", "libgcc-s1", "liblzma5"]
GUEST += [f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", "libsqlite3-0", "libssl3t64"]
GUEST += ["libstdc++6", "libuuid1", f"python{PYTHON}", f"python{PYTHON}-minimal", "zlib1g"]
HOST = ["bochs", "bochs-term", "bochsbios", "vgabios", "cpio", "genisoimage", "isolinux"]
HOST += ["linux-image-cloud-amd64", "syslinux-common"]

CONFIGURATION = """\
config_interface: textconfig
display_library: term
cpu: model={model}, count=1, ips=100000000, exclude_features="{without}"
memory: guest=2048, host=2048
romimage: file={share}/BIOS-bochs-latest
vgaromimage: file={share}/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={folder}/cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={folder}/said.txt
log: {folder}/bochs.log
panic: action=fatal
clock: sync=none
"""

# The timers that Bochs and Linux agree on. Bochs has AMX's tiles without XFD, which Linux needs to
# let programs use them, and then fails at boot: it is told that there are none.
KERNEL = "initrd=initrd console=ttyS0 quiet loglevel=1 panic=1 mitigations=off tsc=reliable"
KERNEL += " lpj=1000000 noapictimer highres=off nohpet clearcpuid=amx_tile"

INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
cd /tmp
{script}
/bin/busybox sleep 2
/bin/busybox poweroff -f
"""


@dataclass(frozen=True)
class Model:
    """A processor of Bochs', and features to leave out: Linux does not boot with them, but for one.

    VCVTNE2PS2BF16 of avx512bf16 gives other numbers in Bochs 3.0 than on a real processor.
    """

    name: str
    without: str


MODELS = {
    "Bochs Skylake-X": Model("corei7_skylake_x", "tsc_deadline"),
    "Bochs Sapphire Rapids": Model(
        "sapphire_rapids", "tsc_deadline,la57,uintr,waitpkg,sca_mitigations,avx512bf16"
    ),
}


def _debian() -> Path:
    """A folder with host/ and guest/: what of Debian runs here, and in the machine."""
    root = BUILD / "x86_64" / "debian"
    if not (root / "guest").is_dir():
        shutil.rmtree(root, ignore_errors=True)
        options = ["--arch=amd64", "--variant=minbase", "--download-only"]
        options += [f"--include={','.join([*HOST, *GUEST])}"]
        run(["debootstrap", *options, DEBIAN, str(root / "host")])
        for package in sorted((root / "host" / "var/cache/apt/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, root / "host"], check=True)
            if package.name.split("_")[0] in GUEST:
                subprocess.run(["dpkg-deb", "-x", package, root / "guest.part"], check=True)
        compile_modules(root / "guest.part", root / "guest.part")
        (root / "guest.part").rename(root / "guest")
    return root


def _of(host: Path, program: str) -> list[str]:
    """The command that runs a program of another Debian, with that one's libraries."""
    libraries = host / "usr" / "lib" / "x86_64-linux-gnu"
    loader = str(libraries / "ld-linux-x86-64.so.2")
    return [loader, "--library-path", str(libraries), str(host / "usr" / "bin" / program)]


def compile_modules(folder: Path, guest: Path | None = None) -> None:
    """Compile modules for the machine's Python: that takes seconds here, and many minutes there."""
    guest = guest or _debian() / "guest"
    python = [*_of(guest, f"python{PYTHON}"), "-m", "compileall", "-q", str(folder)]
    # it complains of modules that are for another Python
    subprocess.run(python, env={"PYTHONHOME": str(guest / "usr")}, check=False)


def _write_cd(folder: Path, folders: dict[str, Path], script: str) -> None:
    """Write cd.iso, which boots the kernel with an initial file system that runs the script."""
    host, guest = _debian() / "host", folder / "guest"
    shutil.rmtree(guest, ignore_errors=True)
    shutil.copytree(_debian() / "guest", guest, symlinks=True)
    for name, source in folders.items():
        shutil.copytree(source, guest / name)
    for name in ("bin", "lib", "lib64"):
        if not (guest / name).exists():
            (guest / name).symlink_to(f"usr/{name}")
    (guest / "init").write_text(INIT.format(script=script))
    (guest / "init").chmod(0o755)
    cd = folder / "cd"
    shutil.rmtree(cd, ignore_errors=True)
    cd.mkdir()
    names = "\n".join(str(path.relative_to(guest)) for path in sorted(guest.rglob("*")))
    with (cd / "initrd").open("wb") as initial:
        command = [*_of(host, "cpio"), "-o", "-H", "newc", "--quiet"]
        subprocess.run(command, cwd=guest, input=names.encode(), stdout=initial, check=True)
    (kernel,) = (host / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, cd / "linux")
    shutil.copy(host / "usr/lib/ISOLINUX/isolinux.bin", cd)
    shutil.copy(host / "usr/lib/syslinux/modules/bios/ldlinux.c32", cd)
    (cd / "isolinux.cfg").write_text(f"default l\nlabel l\n kernel linux\n append {KERNEL}\n")
    options = "-quiet -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table"
    command = [*_of(host, "genisoimage"), *options.split(), "-o", str(folder / "cd.iso"), str(cd)]
    subprocess.run(command, check=True)


def _read_screen(machine: subprocess.Popen[bytes]) -> None:
    """Read what a machine draws in its terminal, which holds 4 KiB: then Bochs would wait."""
    screens: list[str] = []
    while not screens and machine.poll() is None:
        time.sleep(0.2)
        for opened in Path(f"/proc/{machine.pid}/fdinfo").glob("*"):
            screens += re.findall(r"^tty-index:\s*(\d+)", opened.read_text(), re.MULTILINE)
    if screens:
        screen = os.open(f"/dev/pts/{screens[0]}", os.O_RDWR | os.O_NOCTTY)
        tty.setraw(screen)
        with contextlib.suppress(OSError):  # the machine is off
            while os.read(screen, 4096):
                pass
        os.close(screen)


def boot(model: Model, folders: dict[str, Path], script: str, seconds: int) -> str:
    """Run a shell script on a processor, and return what it wrote.

    folders: names in the machine's / and what to copy there. Raises TimeoutError when the machine
    does not switch itself off in time.
    """
    host, folder = _debian() / "host", BUILD / "x86_64" / f"bochs-{model.name}"
    folder.mkdir(exist_ok=True)
    _write_cd(folder, folders, script)
    share = host / "usr" / "share" / "bochs"
    settings = {"model": model.name, "without": model.without, "share": share, "folder": folder}
    (folder / "bochsrc").write_text(CONFIGURATION.format(**settings))
    (folder / "said.txt").write_text("")
    plugins = host / "usr" / "lib" / "x86_64-linux-gnu" / "bochs" / "plugins"
    environment = {"LTDL_LIBRARY_PATH": str(plugins), "BXSHARE": str(share), "TERM": "linux"}
    machine = subprocess.Popen(
        [*_of(host, "bochs-bin"), "-q", "-f", str(folder / "bochsrc")],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    threading.Thread(target=_read_screen, args=(machine,), daemon=True).start()
    try:
        machine.wait(seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"after {seconds} s the machine still ran") from None
    finally:
        machine.kill()
    return (folder / "said.txt").read_text(errors="replace").replace("\r\n", "\n")
