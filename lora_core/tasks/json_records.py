"""json: a sentence -> a JSON record. Four kinds of record, each with its own keys and types."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from lora_core.tasks.draw import a, capital, distinct, stream
from lora_core.tasks.scores import score_json
from lora_core.tasks.task import Row, Task

NAME = "json"
ABOUT = "A sentence, and the same facts as a JSON record."

FIRST = (
    "Mara Jonas Priya Tomas Leila Emeka Ingrid Oscar Yuki Fatima Bruno Nadia Kofi Elsa Mateo Aisha Viktor Rosa Hugo "
    "Salma Dmitri Chloe Arjun Greta Luis Amina Felix Noor Stefan Zara"
).split()
LAST = "Lind Okafor Rao Novak Haddad Silva Berg Tanaka Moreau Ivanov Costa Fischer Mensah Quinn Duarte Walsh".split()
CITIES = "Oslo Lisbon Nairobi Lima Kyoto Dublin Hanoi Prague Quito Accra Turin Bergen Leeds Ghent Austin Perth".split()
JOBS = (
    "nurse,carpenter,teacher,pilot,baker,architect,gardener,electrician,librarian,engineer,violinist,plumber,"
    "accountant,interpreter,farmer,chemist"
).split(",")
# what can be ordered: (one, several)
ITEMS = (
    ("pizza", "pizzas"),
    ("salad", "salads"),
    ("lemonade", "lemonades"),
    ("coffee", "coffees"),
    ("burger", "burgers"),
    ("milkshake", "milkshakes"),
    ("portion of chips", "portions of chips"),
    ("bowl of soup", "bowls of soup"),
)
SIZES = ("small", "medium", "large")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
EVENTS = (
    "budget review,choir practice,dentist appointment,book club,design meeting,parents' evening,chess match,"
    "yoga class,job interview,team lunch,guitar lesson,fire drill"
).split(",")
ROOMS = "the library,the town hall,room 12,the canteen,the blue room,the main office,the gym,the garden".split(",")
MEANS = ("train", "bus", "ferry", "plane", "car")
MONTHS = "January February March April May June July August September October November December".split()


def person(rng: Random) -> tuple[str, dict[str, Any]]:
    """{"name", "age", "job", "city"}"""
    name, age = f"{rng.choice(FIRST)} {rng.choice(LAST)}", rng.randint(19, 79)
    job, city = rng.choice(JOBS), rng.choice(CITIES)
    text = rng.choice(
        (
            f"{name} is {a(f'{age}-year-old')} {job} from {city}.",
            f"{name}, {age}, works as {a(job)} in {city}.",
            f"Meet {name}: {age} years old, {job}, lives in {city}.",
            f"In {city} there is {a(job)} called {name}, who is {age}.",
            f"At {age}, {name} still works as {a(job)} in {city}.",
            f"My neighbour {name} from {city} is {a(job)} and turned {age} last week.",
        )
    )
    return text, {"name": name, "age": age, "job": job, "city": city}


def order(rng: Random) -> tuple[str, dict[str, Any]]:
    """{"item", "count", "size", "takeaway"}; the item in the singular, the count as a number."""
    item, count, size = rng.choice(ITEMS), rng.randint(1, 12), rng.choice(SIZES)
    takeaway = rng.random() < 0.5
    dish = item[0] if count == 1 else item[1]
    amount = f"{NUMBERS[count] if rng.random() < 0.6 else count} {size} {dish}"
    away = rng.choice(("to take away", "to go")) if takeaway else rng.choice(("to eat in", "for here"))
    text = rng.choice(
        (
            f"I would like {amount} {away}, please.",
            f"Can we have {amount}, {away}?",
            f"{amount} {away}, please.",
            f"We'll take {amount}. That's {away}.",
            f"Table four wants {amount}, {away}.",
            f"Hello, {amount} {away} for me.",
        )
    )
    return capital(text), {"item": item[0], "count": count, "size": size, "takeaway": takeaway}


def event(rng: Random) -> tuple[str, dict[str, Any]]:
    """{"event", "day", "time", "place"}; the time on a 24-hour clock."""
    what, day, place = rng.choice(EVENTS), rng.choice(DAYS), rng.choice(ROOMS)
    hour, minute = rng.randint(8, 20), rng.choice((0, 15, 30, 45))
    twelve, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    clock = rng.choice((f"{hour}:{minute:02d}", f"{twelve}{f':{minute:02d}' if minute else ''} {half}"))
    text = rng.choice(
        (
            f"The {what} is on {day} at {clock} in {place}.",
            f"Don't forget the {what}: {day}, {clock}, {place}.",
            f"On {day} at {clock} we have the {what} in {place}.",
            f"Please come to {place} for the {what} on {day} at {clock}.",
            f"{day}'s {what} starts at {clock} in {place}.",
            f"The {what} has moved to {place}, {day} at {clock}.",
        )
    )
    return text, {"event": what, "day": day, "time": f"{hour:02d}:{minute:02d}", "place": place}


def trip(rng: Random) -> tuple[str, dict[str, Any]]:
    """{"from", "to", "by", "date": {"day", "month"}, "return"}; return is true or false."""
    start, end = rng.sample(CITIES, 2)
    by, day, month, back = rng.choice(MEANS), rng.randint(1, 28), rng.randint(1, 12), rng.random() < 0.5
    date = rng.choice((f"{day} {MONTHS[month - 1]}", f"{MONTHS[month - 1]} {day}"))
    text = rng.choice(
        (
            f"{'A return' if back else 'A one-way'} trip by {by} from {start} to {end} on {date}.",
            f"On {date} I'm going from {start} to {end} by {by}{' and back' if back else ', one way'}.",
            f"Book me {'a return' if back else 'a single'} to {end} by {by}, leaving {start} on {date}.",
            f"By {by} to {end}, starting in {start} on {date}, {'with' if back else 'without'} the way back.",
        )
    )
    record = {"from": start, "to": end, "by": by, "date": {"day": day, "month": month}, "return": back}
    return text, record


KINDS: tuple[Callable[[Random], tuple[str, dict[str, Any]]], ...] = (person, order, event, trip)


def generate(seed: int, train: int, test: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows to train on and held-out rows."""

    def make(rng: Random) -> tuple[str, str]:
        text, record = rng.choice(KINDS)(rng)
        return text, json.dumps(record)

    return distinct(stream(NAME, seed), make, train, test, NAME)


def build(seed: int, train: int, test: int) -> Task:
    """The task; exact match by parsed JSON, so that the order of keys does not matter. What does not parse is wrong."""
    rows, held = generate(seed, train, test)
    return Task(
        name=NAME,
        about=ABOUT,
        train=rows,
        test=held,
        score_name="exact match",
        scorer=score_json,
        suggested={"max_new_tokens": 64},
    )
