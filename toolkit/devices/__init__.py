"""Devices. One module per way to reach one, each a `Device`; `open` is the only place that knows which exist."""

from __future__ import annotations

from toolkit import profiles
from toolkit.devices import local, simulated
from toolkit.devices.base import Device, Facts, Loaded, Reading, Rig, Taken, Visit, conditions
from toolkit.errors import UsageError
from toolkit.schema import Profile

__all__ = ["Device", "Facts", "Loaded", "Reading", "Rig", "Taken", "Visit", "conditions", "open"]


def open(profile: Profile) -> Device:
    """The device of a profile.

    Raises:
        UsageError: it is neither this machine, nor a simulated one, nor one at the end of ssh.
    """
    profiles.check_measurable(profile)
    profiles.check_measured(profile)
    if profile.simulation is not None:
        return simulated.Simulated(profile.device, profile.simulation)
    if profile.device == "local":
        return local.Local()
    if profile.device.startswith("ssh://"):
        from toolkit.devices import ssh

        return ssh.connected(profile.device)
    raise UsageError(
        f"Profile {profile.id} is of the device {profile.device!r}, which this version cannot reach.",
        "Choose a profile whose device is `local` (see `edgekit profiles`), or run edgekit on that device.",
    )
