"""Write phrases that name a digit, as a person types them: with typing errors."""

import random

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# the phrases of the test are others than those of the training
TRAINING = (
    "{}", "{}", "{}!", "it is a {}", "it's {}", "this is {}", "a {}", "the {}", "the number {}", "number {}",
    "digit {}", "i see a {}", "i think it is a {}", "that looks like a {}", "a handwritten {}",
    "my digit is {}", "{} please", "i wrote {}", "she said {}", "he says {}", "the answer is {}", "maybe {}?",
    "probably a {}", "{} i guess", "you can read {} here", "{} is what i mean", "here is {}",
    "there is a {} on the page", "we heard {}", "is it a {}?", "definitely {}", "looks like {}", "write {}",
    "a drawing of {}", "label: {}", "class {}",
)  # fmt: skip
TEST = (
    "perhaps {}", "{} it is", "should be {}", "{} for sure", "the figure shows {}", "somebody scribbled a {}",
    "value = {}", "I would say that's {}", "my child drew {} with a pen", "surely {}", "press {} now",
    "they spoke the word {}", "result: {}", "what you hear is {}", "{}, or so it seems",
)  # fmt: skip
WORDS = (
    "a an and any apple are as at back ball be because big black blue book both box boy but by call came can car cat "
    "clear cold come could dark day did do dog door down each easy end every eye face far fast find fire first fish "
    "food from full game get girl give go good got grey hand has have head hear help her high him his home house how "
    "i if image in into just keep kind know last left less letter life light like line list little long look made "
    "make man many may me mean more most mother much must my name near new next night no not note now of off old only "
    "open other our out over own page paper part pen people picture place plain play quick rather read red right said "
    "same say sea see sheet show side sign small so some song sound spoken still stop story sure take talk tell text "
    "than that them then they thing think time top town true turn under up us use very voice wait walk want "
    "was water way well went were what when where which while white who why will with word work world would year you"
)
FILLERS = WORDS.split()
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
EDITS = ("drop", "double", "swap", "slip")


def phrase(digit: int, templates: tuple[str, ...], generator: random.Random, errors: float = 0.5) -> str:
    """Write a phrase that names the digit.

    Args:
        digit: 0 to 9.
        templates: with {} for the digit, of which one is chosen.
        generator: of the choices.
        errors: the probability of a typing error in the digit's name, and of each in the rest.
    """
    before, after = generator.choice(templates).split("{}")
    if generator.random() < 0.35:
        name = str(digit)
    else:
        name = mistyped(NAMES[digit], generator) if generator.random() < errors else NAMES[digit]
    rest = [mistyped(part, generator) if part and generator.random() < errors else part for part in (before, after)]
    return in_case(name.join(rest), generator)


def chatter(digit: int, generator: random.Random) -> str:
    """Write a phrase that names the digit among words at random."""
    words = generator.choices(FILLERS, k=generator.randint(0, 6))
    words.insert(generator.randint(0, len(words)), "{}")
    return phrase(digit, (generator.choice((" ", " ", " ", ", ")).join(words),), generator)


def in_case(text: str, generator: random.Random) -> str:
    return generator.choices((text, text.capitalize(), text.upper(), text.title()), weights=(6, 3, 1, 1))[0]


def mistyped(text: str, generator: random.Random) -> str:
    """Make a typing error: leave out a letter, double it, swap it with the next, or hit the key beside it."""
    at = generator.randrange(len(text))
    edit, letter, rest = generator.choice(EDITS), text[at], text[at + 1 :]
    if edit == "drop":
        return text[:at] + rest
    if edit == "double":
        return text[:at] + letter * 2 + rest
    if edit == "swap" and rest:
        return text[:at] + rest[0] + letter + rest[1:]
    return text[:at] + beside(letter, generator) + rest


def beside(letter: str, generator: random.Random) -> str:
    row = next((row for row in KEYS if letter.lower() in row), letter)
    at = row.find(letter.lower()) if len(row) > 1 else 0
    return generator.choice(row[max(0, at - 1) : at] + row[at + 1 : at + 2] or letter)
