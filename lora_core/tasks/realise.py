"""The grammar behind `restaurant`: facts -> one of many ways to say them.

A text is one to three sentences. Each fact can be said in several places: as an adjective before the noun ("a cheap
Italian pub"), after it ("in the old town, near the Clock Tower"), as a clause ("where children are welcome") or in a
sentence of its own ("Prices are low."). A plan decides which fact goes where.
"""

from __future__ import annotations

from random import Random

from lora_core.tasks.draw import a, capital

TYPES = ("pub", "restaurant", "coffee shop", "bistro", "tea room", "wine bar")
FOODS = ("Italian", "Japanese", "Indian", "French", "Mexican", "Turkish", "Vietnamese", "Greek", "Ethiopian", "English")
NEAR = (
    "the Clock Tower",
    "Miller's Books",
    "the Rose Theatre",
    "Penny Lane Station",
    "the Botanic Garden",
    "Hill Street Market",
    "the Maritime Museum",
    "Saint Anne's Church",
)
# how an area is said after the noun
AREAS = {
    "riverside": ("by the riverside", "in the riverside area", "on the riverside"),
    "city centre": ("in the city centre", "in the heart of the city centre"),
    "old town": ("in the old town", "in a lane of the old town"),
    "harbour": ("by the harbour", "down at the harbour", "in the harbour area"),
    "university quarter": ("in the university quarter", "right in the university quarter"),
    "market square": ("on the market square", "just off the market square"),
}
# every phrase that says a price or a rating; the first ones stand before a noun, see _PRICE and _RATING
PRICES = {
    "low": ("low priced", "low prices", "prices are low", "cheap", "inexpensive", "costs little", "price : low"),
    "moderate": (
        "moderately priced",
        "mid priced",
        "moderate prices",
        "prices are moderate",
        "neither cheap nor expensive",
        "average prices",
        "price : moderate",
    ),
    "high": ("high priced", "high prices", "prices are high", "expensive", "pricey", "costs a lot", "price : high"),
}
RATINGS = {
    "poor": (
        "poorly rated",
        "poor customer rating",
        "poor reviews",
        "customers rate it poorly",
        "reviews are poor",
        "rating : poor",
    ),
    "average": (
        "averagely rated",
        "average customer rating",
        "average reviews",
        "customers rate it as average",
        "reviews are average",
        "rating : average",
    ),
    "excellent": (
        "highly rated",
        "excellent customer rating",
        "excellent reviews",
        "customers rate it as excellent",
        "reviews are excellent",
        "rating : excellent",
    ),
}
_PRICE = {"low": ("cheap", "low-priced", "inexpensive"), "moderate": ("moderately priced", "mid-priced")}
_PRICE["high"] = ("expensive", "high-priced", "pricey")
_RATING = {"poor": ("poorly rated",), "average": (), "excellent": ("highly rated",)}


def realise(facts: dict[str, str], rng: Random) -> str:
    """One text that states every fact: name, and any of type, food, price, rating, area, family friendly, near."""
    rest = dict(facts)
    name = rest.pop("name")
    noun = _noun(rest, rng)
    place = _place(rest, rng)
    tail = _with(rest, rng)
    opening = rng.randrange(6 if place else 4)
    where = f" {place}" if place else ""
    if opening == 0:
        first = f"{name} is {a(noun)}{where}{tail}"
    elif opening == 1 and not tail and (where or " " in noun):
        first = f"{a(noun)}{where} is {name}"
    elif opening in (1, 2):
        first = f"there is {a(noun)} called {name}{where}{tail}"
    elif opening == 3:
        verb = rng.choice(("try", "visit", "you could go to"))
        first = f"{verb} {name}, {a(noun)}{where}{tail}"
    elif opening == 4:
        comma = "," if "," in place else ""
        first = f"{place}{comma} {rng.choice(('you will find', 'there is'))} {name}, {a(noun)}{tail}"
    else:
        verb = rng.choice(("is located", "can be found", "sits"))
        first = f"{name}, {a(noun)}{tail}, {verb} {place}" if tail else f"{name}, {a(noun)}, {verb} {place}"
    sentences = [first, *_sentences(rest, rng)]
    return " ".join(capital(s) + "." for s in sentences)


def _noun(rest: dict[str, str], rng: Random) -> str:
    """ "cheap Italian pub": takes type and food, and perhaps price, rating or family friendly, out of `rest`."""
    kind, food = rest.pop("type", ""), rest.pop("food", "")
    options = [("price", _PRICE.get(rest.get("price", ""), ()))]
    options += [("rating", _RATING.get(rest.get("rating", ""), ()))]
    options += [("family friendly", ("family-friendly",) if rest.get("family friendly") == "yes" else ())]
    key, words = rng.choice(options)  # at most one of them stands before the noun
    adjectives = [rng.choice(words)] if words else []
    if adjectives:
        del rest[key]
    base = kind or rng.choice(("place", "restaurant"))
    if not food:
        return " ".join([*adjectives, base])
    if rng.random() < 0.5:
        return " ".join([*adjectives, food, base])
    serving = rng.choice(
        (f"that serves {food} food", f"serving {food} food", f"with {food} food", f"for {food} cuisine")
    )
    return " ".join([*adjectives, base, serving])


def _place(rest: dict[str, str], rng: Random) -> str:
    """ "in the old town, near the Clock Tower": takes area and near."""
    area, near = rest.pop("area", ""), rest.pop("near", "")
    where = rng.choice(AREAS[area]) if area else ""
    close = f"{rng.choice(('near', 'close to', 'next to', 'not far from'))} {near}" if near else ""
    if where and close:
        return rng.choice((f"{where}, {close}", f"{where} {close}", f"{close} {where}"))
    return where or close


def _with(rest: dict[str, str], rng: Random) -> str:
    """ " with low prices and excellent reviews": takes price, rating or both, or nothing."""
    if rng.random() < 0.5:
        return ""
    parts = []
    if "price" in rest:
        parts.append(f"{rest.pop('price')} prices")
    if "rating" in rest and rng.random() < 0.6:
        rating = rest.pop("rating")
        parts.append(rng.choice((f"{rating} reviews", f"{a(rating)} customer rating")))
    return f" with {' and '.join(parts)}" if parts else ""


def _sentences(rest: dict[str, str], rng: Random) -> list[str]:
    """What is still unsaid, in one or two further sentences, of which the subject is "it" or the thing itself."""
    clauses = []
    if "price" in rest:
        value = rest.pop("price")
        own = {
            "low": ("prices are low", "it is cheap", "a meal costs little"),
            "moderate": ("prices are moderate", "it is moderately priced", "it is neither cheap nor expensive"),
            "high": ("prices are high", "it is rather expensive", "a meal costs a lot"),
        }
        clauses.append(rng.choice(own[value]))
    if "rating" in rest:
        value = rest.pop("rating")
        how = {"poor": "poorly", "average": "as average", "excellent": "as excellent"}[value]
        clauses.append(
            rng.choice((f"customers rate it {how}", f"reviews are {value}", f"it has {a(value)} customer rating"))
        )
    if "family friendly" in rest:
        own = {
            "yes": ("it is family-friendly", "children are welcome", "it is good for families", "it welcomes children"),
            "no": (
                "it is not family-friendly",
                "it is not for families",
                "it is not suitable for children",
                "it does not welcome children",
            ),
        }
        clauses.append(rng.choice(own[rest.pop("family friendly")]))
    rng.shuffle(clauses)
    if len(clauses) >= 2 and rng.random() < 0.6:
        return [f"{clauses[0]} and {clauses[1]}", *clauses[2:]]
    return clauses
