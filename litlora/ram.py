"""How much memory the system can still give. Torch-free."""

from pathlib import Path


def free_ram(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still take: the machine's, or less where a control
    group sets a limit; None without /proc.

    `root` is where proc and sys lie. What a group's files fill of the page cache counts as free:
    the kernel gives it back.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    free = [field_of(meminfo, "MemAvailable:") * 1024]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        number, controllers, group = line.split(":", 2)
        if number == "0":  # version 2
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        place = mount / group.strip("/")
        for directory in (
            place,
            *place.parents,
        ):  # a limit holds for all below it; in a container the mount is the group itself
            limit, used = directory / names[0], directory / names[1]
            if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
                free.append(
                    int(limit.read_text())
                    - int(used.read_text())
                    + field_of(directory / "memory.stat", names[2])
                )
            if directory == mount:
                break
    return max(0, min(free))


def field_of(file: Path, name: str) -> int:
    """The number behind a name in a file of lines `name number ...`."""
    return next(
        (int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name]), 0
    )
