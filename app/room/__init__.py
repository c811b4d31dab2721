"""A room full of people: what the presenter asks, what they guess, what everybody runs, and the wall that shows it.

Nothing here knows of pages. The room has a database of its own in LoRA Lab's folder, so that a restart of the server
comes back to the same stage with the same people.
"""

from app.room.room import STAGES, Room

__all__ = ["STAGES", "Room"]
