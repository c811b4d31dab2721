"""Keys: who may come in. A link with a token makes a signed cookie, and the cookie says who asks.

    keys = Keys.kept(home, room=True)         # the same after a restart, so that links on the wall go on working
    f"http://192.168.1.7:7860/?key={keys.presenter}"

A cookie holds a role, a random owner, a random session and the time, signed with a secret that lies in the home folder
and with the token of its role: a new token, and all that came in by the old one are out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from app.pages.visitor import Role, Visitor
from lora_core.home import read_json, writing

FILE = "keys.json"
DAYS = 14  # a cookie's life
BURST, PER_S = 8, 0.5  # wrong keys that an address may try at once, and then a second
ALL_BURST, ALL_PER_S = 100, 5.0  # the same of all addresses together
MOST_ADDRESSES = 2000


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The tokens of the three roles; None where there is no such role. secret: signs cookies."""

    host: str | None = None
    presenter: str | None = None
    participant: str | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @classmethod
    def kept(cls, home: Path, *, room: bool = False, new: bool = False) -> Keys:
        """The keys of a folder: of a room's presenter and participants, or of the host; made at the first time.

        new: makes them anew, and whoever came in before is out. The file is readable by its owner alone.
        """
        path = home / FILE
        known = None if new else read_json(path)
        known = known if isinstance(known, dict) else {}
        found = {}
        for name in ("secret", *get_args(Role)):
            value = known.get(name)
            found[name] = value if isinstance(value, str) and len(value) >= 22 else secrets.token_urlsafe(
                32 if name == "secret" else 16)  # fmt: skip
        if found != known:
            with writing(home):
                home.mkdir(parents=True, exist_ok=True)
                part = home / f".{FILE}.{secrets.token_hex(4)}.part"
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    json.dump(found, file)
                part.replace(path)
        roles = ("presenter", "participant") if room else ("host",)
        return cls(secret=found["secret"].encode(), **{r: found[r] for r in roles})

    def of(self, role: str) -> str | None:
        return getattr(self, role) if role in get_args(Role) else None

    def role(self, token: str) -> Role | None:
        """Whose token this is; takes the same time for every wrong one."""
        found: Role | None = None
        for role in get_args(Role):
            own = self.of(role)
            if own is not None and hmac.compare_digest(own.encode(), token.encode("utf-8", "replace")):
                found = role
        return found

    @property
    def cookie(self) -> str:
        """The cookie's name: browsers do not tell ports apart, so another server's cookie has another one."""
        return f"lora_lab_{hashlib.sha256(self.secret).hexdigest()[:8]}"

    def seal(self, role: Role, owner: str = "") -> str:
        """A new cookie. owner: a participant's, who keeps it; else random for a participant, "" for the others."""
        owner = (owner or secrets.token_hex(8)) if role == "participant" else ""
        head = f"{role}.{owner}.{secrets.token_hex(8)}.{int(time.time())}"
        return f"{head}.{self._sign(role, head)}"

    def open(self, sealed: str) -> tuple[Visitor, str] | None:
        """(who it is, the session) of a cookie; None for one that is not ours, too old, or of a former token."""
        head, _, sign = sealed.rpartition(".")
        parts = head.split(".")
        if len(parts) != 4 or self.of(parts[0]) is None or not parts[3].isdigit() or len(parts[3]) > 12:
            return None
        role: Role = parts[0]  # type: ignore[assignment]
        if not hmac.compare_digest(sign.encode("utf-8", "replace"), self._sign(role, head).encode()):
            return None
        if time.time() - int(parts[3]) > DAYS * 86_400:
            return None
        return Visitor(role=role, owner=parts[1]), parts[2]

    def _sign(self, role: str, head: str) -> str:
        mark = f"{self.of(role)}.{head}"
        return hmac.new(self.secret, mark.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:40]


class Brake:
    """Slows guesses: an address that has tried some wrong keys waits for the next, right or wrong.

    An address without a wrong one is always heard, however many others guess.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address: (tries that are left, when)
        self.all = (float(ALL_BURST), 0.0)

    def open(self, address: str) -> bool:
        """Whether this address may try a key now."""
        place = block(address)
        if place not in self.left:
            return True
        return self._refilled(self.left[place], BURST, PER_S)[0] >= 1 and self._refilled(
            self.all, ALL_BURST, ALL_PER_S)[0] >= 1  # fmt: skip

    def wrong(self, address: str) -> None:
        """It was a wrong one."""
        place = block(address)
        left, now = self._refilled(self.left.get(place, (float(BURST), 0.0)), BURST, PER_S)
        self.left[place] = (max(0.0, left - 1), now)
        self.left.move_to_end(place)
        while len(self.left) > MOST_ADDRESSES:
            self.left.popitem(last=False)
        left, now = self._refilled(self.all, ALL_BURST, ALL_PER_S)
        self.all = (max(0.0, left - 1), now)

    def _refilled(self, kept: tuple[float, float], most: int, per_s: float) -> tuple[float, float]:
        now = self.clock()
        return min(float(most), kept[0] + (now - kept[1]) * per_s), now


def block(address: str) -> str:
    """An address as the brake knows it: whoever has one of IPv6 has the 2⁶⁴ beside it too."""
    if ":" not in address or "." in address:
        return address
    import ipaddress

    try:
        return str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False).network_address)
    except ValueError:
        return address
