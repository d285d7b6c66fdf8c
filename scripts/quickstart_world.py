"""The small world of the quick start: its words, the corpus a base model reads, and the tasks adapters learn.

What: `documents` writes endless short plain-prose documents about a few hundred words: what kind of thing each is, how
big it is, which words are opposites, counting, sums, lists forwards and backwards, days, months, letters, and what
people do in a handful of places. `TASKS` ask about the same world, but as instructions, which the corpus never does.
Why: a base model of a few megabytes that knows such a world, and does not know the tasks, lets every part of
fine-tuning be tried in a minute on any machine.
How: everything is a function of the `random.Random` handed in. `scripts/make_quickstart.py` is the program.
"""

from collections.abc import Callable, Iterator
from random import Random

KINDS: dict[str, list[str]] = {
    "animal": ["dog", "cat", "horse", "cow", "pig", "mouse", "rabbit", "fox", "bear", "goat", "wolf", "lion"],
    "bird": ["robin", "eagle", "owl", "duck", "swan", "crow", "hawk", "goose"],
    "fish": ["trout", "salmon", "cod", "shark", "eel", "carp"],
    "fruit": ["apple", "pear", "plum", "peach", "lemon", "cherry", "grape", "fig"],
    "tool": ["hammer", "saw", "drill", "axe", "rake", "spade"],
    "vehicle": ["car", "bus", "train", "boat", "truck", "bike", "ship", "plane"],
    "garment": ["hat", "coat", "shirt", "sock", "scarf", "glove", "boot", "belt"],
    "tree": ["oak", "pine", "elm", "birch", "maple", "willow"],
}
# From small to large; any two can be compared.
SIZES = [
    "ant", "bee", "coin", "egg", "mouse", "apple", "robin", "shoe", "owl", "duck", "goose", "cat", "fox", "dog",
    "chair", "goat", "wolf", "lion", "bear", "cow", "horse", "car", "truck", "bus", "whale", "house", "ship", "hill",
]  # fmt: skip
OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("tall", "short"), ("hard", "soft"),
    ("wet", "dry"), ("dark", "bright"), ("loud", "quiet"), ("rich", "poor"), ("clean", "dirty"), ("full", "empty"),
    ("strong", "weak"), ("thick", "thin"), ("wide", "narrow"), ("sharp", "blunt"), ("happy", "sad"), ("good", "bad"),
    ("near", "far"), ("high", "low"), ("deep", "shallow"), ("heavy", "light"), ("smooth", "rough"), ("sweet", "sour"),
    ("open", "shut"), ("kind", "mean"), ("safe", "risky"), ("early", "late"),
]  # fmt: skip
OPPOSITE = dict(OPPOSITES) | {second: first for first, second in OPPOSITES}
ADJECTIVES = sorted(OPPOSITE)
SCENES = ["river", "road", "room", "box", "cup", "door", "song", "game", "book", "lake", "bed", "town"]
COLOURS = ["red", "blue", "green", "brown", "white", "black"]
NAMES = ["Ann", "Tom", "Ben", "Eva", "Max", "Mia", "Sam", "Leo", "Ida", "Kim"]
PLACES = ["park", "farm", "school", "market", "garden", "beach"]
COUNTED = ["apple", "pear", "plum", "lemon", "coin", "egg", "hat", "book", "cup", "shoe"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
STEPS = [1, 2, 3, 4, 5, 10]
LARGEST_ADDEND = 15

THINGS = sorted({thing for things in KINDS.values() for thing in things})
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
NOUNS = sorted({*THINGS, *SIZES, *SCENES})

Row = dict[str, str]


def with_article(word: str) -> str:
    """Return the word behind `a` or `an`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# --- the corpus -------------------------------------------------------------------------------------------------------


def _kind_fact(rng: Random) -> str:
    kind = rng.choice(list(KINDS))
    first, second, third = rng.sample(KINDS[kind], 3)
    return rng.choice(
        [
            f"The {first} is {with_article(kind)}.",
            f"Every {first} is {with_article(kind)}, and so is every {second}.",
            f"There are many kinds of {kind}: the {first}, the {second} and the {third}.",
            f"{rng.choice(NAMES)} has seen a {rng.choice(COLOURS)} {first}. It is {with_article(kind)}.",
        ]
    )


def _some_things(rng: Random, count: int) -> tuple[list[str], str]:
    """Return things of different kinds, in any order, and one of them."""
    things = [rng.choice(KINDS[kind]) for kind in rng.sample(list(KINDS), count)]
    return things, rng.choice(things)


def _kind_scene(rng: Random) -> str:
    things, one = _some_things(rng, 3)
    seen = ", ".join(f"the {thing}" for thing in things[:-1]) + f" and the {things[-1]}"
    kind, name = KIND_OF[one], rng.choice(NAMES)
    return rng.choice(
        [
            f"{name} saw {seen}. The only {kind} was the {one}.",
            f"In the {rng.choice(PLACES)} were {seen}. {name} looked for {with_article(kind)} and took the {one}.",
            f"{name} was shown {seen}, and was asked to find the {kind}: {one}!",
            f"Of {', '.join(things)}, the {kind} is the {one}.",
        ]
    )


def _opposite_fact(rng: Random) -> str:
    word = rng.choice(ADJECTIVES)
    other, name, noun = OPPOSITE[word], rng.choice(NAMES), rng.choice(NOUNS)
    return rng.choice(
        [
            f"The opposite of {word} is {other}.",
            f"What is not {word} may be {other}.",
            f"The {noun} is not {word}, no, it is {other}.",
            f"{name} wanted the {word} {noun}, but got the opposite, the {other} {noun}.",
            f"First it was the {word} {noun}, now it has turned into the {other} {noun}.",
        ]
    )


def _size_fact(rng: Random) -> str:
    low, high = sorted(rng.sample(range(len(SIZES)), 2))
    small, large = SIZES[low], SIZES[high]
    pair = rng.sample([small, large], 2)
    both = f"the {pair[0]} and the {pair[1]}"
    return rng.choice(
        [
            f"The {large} is bigger than the {small}.",
            f"The {small} is smaller than the {large}.",
            f"{rng.choice(NAMES)} drew {both}. The bigger one was the {large}.",
            f"{rng.choice(NAMES)} drew {both}. The smaller one was the {small}.",
            f"Of {both}, it is the {small} that is smaller and the {large} that is bigger.",
        ]
    )


def _progression(rng: Random, count: int) -> tuple[list[int], int]:
    """Return numbers from 0 to 99 that rise or fall by one step, and the step."""
    step = rng.choice(STEPS)
    low = rng.randrange(100 - step * (count - 1))
    numbers = [low + step * index for index in range(count)]
    return (numbers, step) if rng.random() < 0.5 else (numbers[::-1], -step)


def _counting(rng: Random) -> str:
    numbers, step = _progression(rng, rng.choice([5, 6, 7, 8]))
    text = ", ".join(map(str, numbers))
    way = "up" if step > 0 else "down"
    return rng.choice(
        [
            f"{rng.choice(NAMES)} counts {way} by {abs(step)}: {text}.",
            f"On the wall were the numbers {text}.",
            f"{text} is counting {way}.",
        ]
    )


def _sum_fact(rng: Random) -> str:
    left, right = (rng.randint(1, LARGEST_ADDEND) for _ in range(2))
    total = left + right
    return rng.choice(
        [
            f"{left} plus {right} is {total}.",
            f"{total} minus {right} is {left}.",
            f"Take {right} from {total} and {left} is left.",
            f"{left} and {right} more make {total}.",
        ]
    )


GAINS = ["got", "found", "bought", "picked"]
LOSSES = ["gave", "lost", "sold", "dropped"]


def _sum_story(rng: Random) -> str:
    left, right = (rng.randint(1, LARGEST_ADDEND) for _ in range(2))
    total, thing = left + right, rng.choice(COUNTED)
    name, other = rng.sample(NAMES, 2)
    gain, loss, after = rng.choice(GAINS), rng.choice(LOSSES), rng.choice(["So", "Then", "Now", "In the end"])
    return rng.choice(
        [
            f"{name} had {left} {thing}s and {gain} {right} more. {after} {name} had {total} {thing}s.",
            f"{name} had {left} {thing}s. {other} {gain} {right} more for {name}, which made {total}.",
            f"{name} had {total} {thing}s and {loss} {right}. {after} {name} had {left} {thing}s.",
            f"In the box were {total} {thing}s. {name} {loss} {right} of them, which left {left}.",
        ]
    )


def _list_backwards(rng: Random) -> str:
    words = rng.sample(NOUNS, rng.choice([2, 3, 3, 4]))
    forward, backward = " ".join(words), " ".join(words[::-1])
    name, other = rng.sample(NAMES, 2)
    return rng.choice(
        [
            f"{name} wrote {forward}. From the back it reads {backward}.",
            f"{name} said {forward}, and {other} said it backwards: {backward}.",
            f"{name} said {forward}, and {other} said it again: {forward}.",
            f"Backwards, {forward} is {backward}.",
        ]
    )


def _calendar(rng: Random) -> str:
    names, unit = rng.choice([(DAYS, "day"), (MONTHS, "month"), (LETTERS, "letter")])
    at, span = rng.randrange(len(names)), rng.randint(2, 5)
    run = [names[(at + index) % len(names)] for index in range(span)]
    return rng.choice(
        [
            f"The {unit} after {run[0]} is {run[1]}.",
            f"The {unit} before {run[1]} is {run[0]}.",
            f"In order: {', '.join(run)}.",
        ]
    )


def _spelling(rng: Random) -> str:
    word = rng.choice([*NOUNS, *ADJECTIVES])
    return f"The word {word} is spelled {' '.join(word)}."


def _story(rng: Random) -> str:
    name, other = rng.sample(NAMES, 2)
    place, colour, day = rng.choice(PLACES), rng.choice(COLOURS), rng.choice(DAYS)
    thing, word = rng.choice(NOUNS), rng.choice(ADJECTIVES)
    return (
        f"On {day} {name} went to the {place} and found {with_article(word)} {thing}. "
        f"{other} asked what it was like. {name} said that the {thing} was {word} and {colour}. "
        f"{other} went to the {place} too, but the {word} {thing} was not there."
    )


def _ask_kind(rng: Random) -> tuple[str, str]:
    things, one = _some_things(rng, 3)
    kind, text = KIND_OF[one], ", ".join(things)
    return rng.choice([f"{text}: where is the {kind}", f"what {kind} do you see in {text}"]), one


def _ask_size(rng: Random) -> tuple[str, str]:
    low, high = sorted(rng.sample(range(len(SIZES)), 2))
    first, second = rng.sample([SIZES[low], SIZES[high]], 2)
    word, answer = rng.choice([("bigger", SIZES[high]), ("smaller", SIZES[low])])
    return rng.choice([f"what is {word}, {first} or {second}", f"of {first} and {second}, what is {word}"]), answer


def _ask_opposite(rng: Random) -> tuple[str, str]:
    word, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    if rng.random() < 0.5:
        return f"what is the opposite of {word}", OPPOSITE[word]
    return f"what is the opposite of the {word} {noun}", f"the {OPPOSITE[word]} {noun}"


def _ask_number(rng: Random) -> tuple[str, str]:
    *numbers, last = _progression(rng, rng.choice([4, 5, 6]))[0]
    text = ", ".join(map(str, numbers))
    return rng.choice([f"what comes after {text}", f"if you count {text}, what is next"]), str(last)


def _ask_sum(rng: Random) -> tuple[str, str]:
    left, right = (rng.randint(1, LARGEST_ADDEND) for _ in range(2))
    total, things, name = left + right, f"{rng.choice(COUNTED)}s", rng.choice(NAMES)
    gain, loss = rng.choice(GAINS), rng.choice(LOSSES)
    return rng.choice(
        [
            (f"what is {left} plus {right}", str(total)),
            (f"what is {total} minus {right}", str(left)),
            (f"{name} had {left} {things} and {gain} {right} more, so how many were there", str(total)),
            (f"{name} had {total} {things} and {loss} {right} of them, so how many were left", str(left)),
        ]
    )


def _ask_backwards(rng: Random) -> tuple[str, str]:
    words = rng.sample(NOUNS, rng.choice([2, 3, 3, 4]))
    forward, backward = " ".join(words), " ".join(words[::-1])
    return rng.choice([f"how does {forward} read from the back", f"what is {forward} backwards"]), backward


_QUIZ = [
    _ask_kind, _ask_kind, _ask_kind, _ask_size, _ask_opposite, _ask_number, _ask_number, _ask_sum, _ask_sum,
    _ask_backwards,
]  # fmt: skip


def _quiz(rng: Random) -> str:
    """Return people asking each other, told in one of many ways."""
    question, answer = rng.choice(_QUIZ)(rng)
    name, other = rng.sample(NAMES, 2)
    return rng.choice(
        [
            f"{name} asked {other}: {question}? {other} said: {answer}.",
            f"{question}? So {name} asked. {answer}, said {other}.",
            f"{name}: {question}? {other}: {answer}.",
            f"{name} did not know it: {question}? It was {answer}.",
            f"{name} - {question} - {answer}!",
            f"A riddle for {name}; {question}; {answer}.",
            f"{question} = {answer}.",
        ]
    )


_TOPICS: list[tuple[Callable[[Random], str], int]] = [
    (_kind_fact, 6), (_kind_scene, 16), (_opposite_fact, 5), (_size_fact, 9), (_counting, 13), (_sum_fact, 6),
    (_sum_story, 8), (_list_backwards, 5), (_calendar, 1), (_spelling, 1), (_story, 2), (_quiz, 36),
]  # fmt: skip


def documents(rng: Random) -> Iterator[str]:
    """Yield documents without end: three sentences or so on one topic each."""
    topics, weights = zip(*_TOPICS, strict=True)
    while True:
        (topic,) = rng.choices(topics, weights)
        yield " ".join(topic(rng) for _ in range(rng.randint(2, 4)))


# --- the tasks --------------------------------------------------------------------------------------------------------
# A task returns a row and the key of what it asks. Rows of one key are all for training or all held out.

Asked = tuple[object, Row]


def _row(instruction: str, text: str, output: str) -> Row:
    return {"instruction": instruction, "input": text, "output": output}


def _task_category(rng: Random) -> Asked:
    things, one = _some_things(rng, 3)
    kind = KIND_OF[one]
    return (kind, *sorted(things)), _row(f"Find the {kind}.", ", ".join(things), one)


def _task_compare(rng: Random) -> Asked:
    low, high = sorted(rng.sample(range(len(SIZES)), 2))
    first, second = rng.sample([SIZES[low], SIZES[high]], 2)
    bigger = rng.random() < 0.5
    question = f"Which is {'bigger' if bigger else 'smaller'}, {with_article(first)} or {with_article(second)}?"
    return (low, high), _row(question, "", SIZES[high] if bigger else SIZES[low])


def _task_opposite(rng: Random) -> Asked:
    word, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    row = _row("Rewrite the phrase so that it says the opposite.", f"the {word} {noun}", f"the {OPPOSITE[word]} {noun}")
    return (word, noun), row


def _task_reverse(rng: Random) -> Asked:
    words = rng.sample(NOUNS, rng.choice([3, 3, 4]))
    return tuple(words), _row("Reverse the order of the words.", " ".join(words), " ".join(words[::-1]))


def _task_sequence(rng: Random) -> Asked:
    numbers, step = _progression(rng, 5)
    text = ", ".join(map(str, numbers[:4]))
    return (numbers[0], step), _row("What number comes next?", text, str(numbers[4]))


def _task_sums(rng: Random) -> Asked:
    left, right = (rng.randint(1, LARGEST_ADDEND) for _ in range(2))
    total, things, name = left + right, f"{rng.choice(COUNTED)}s", rng.choice(NAMES)
    if rng.random() < 0.5:
        question = f"{name} had {left} {things} and found {right} more. How many were there?"
        return (left, right), _row(question, "", str(total))
    question = f"{name} had {total} {things} and lost {right} of them. How many were left?"
    return (left, right), _row(question, "", str(left))


TASKS: dict[str, Callable[[Random], Asked]] = {
    "category": _task_category,
    "compare": _task_compare,
    "opposite": _task_opposite,
    "reverse": _task_reverse,
    "sequence": _task_sequence,
    "sums": _task_sums,
}


def task_rows(name: str, seed: int, train: int, test: int, held_out: float = 0.15) -> tuple[list[Row], list[Row]]:
    """Return the training rows and the test rows of a task, all different, with no key on both sides."""
    rng = Random(f"{name} {seed}")
    seen: set[tuple[str, ...]] = set()
    side_of: dict[object, bool] = {}
    rows: dict[bool, list[Row]] = {False: [], True: []}
    wanted = {False: train, True: test}
    for _ in range(1000 * (train + test)):
        key, row = TASKS[name](rng)
        side = side_of.setdefault(key, rng.random() < held_out)
        prompt = (row["instruction"], row["input"])
        if prompt not in seen and len(rows[side]) < wanted[side]:
            seen.add(prompt)
            rows[side].append(row)
        if all(len(rows[side]) == wanted[side] for side in wanted):
            return rows[False], rows[True]
    raise ValueError(f"task {name} has too few different questions for {train} training and {test} test rows")


__all__ = ["TASKS", "Row", "documents", "task_rows"]
