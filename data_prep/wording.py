"""Words and statements of the generators; what is asked about them: questions.py. Everything is a pair of disjoint
halves: the first for training, the second for validation and test.
"""

Halves = tuple[tuple[str, ...], tuple[str, ...]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES: Halves = (
    ("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi", "Perth", "Turin", "Lagos", "Kyoto", "Dakar", "Minsk", "Boston"),
    ("Riga", "Lima", "Accra", "Delhi", "Porto", "Osaka", "Basel", "Tunis", "Sofia", "Davos", "Malmo", "Denver"),
)
# Keys are pairs `adjective thing`: hundreds in each half.
ADJECTIVES: Halves = (
    _words("amber brave calm dusty eager faint gentle hollow icy jolly keen lucky mellow narrow odd plain"),
    _words("quick rusty shiny tidy upper vivid warm young ancient blunt crisp dim early fresh grand humble"),
)
THINGS: Halves = (
    _words("anchor basket candle drawer engine feather guitar hammer island jacket kettle ladder magnet needle"),
    _words("oven pillow quilt ribbon saddle tunnel umbrella violin wagon yacht zipper bottle carpet dagger"),
)
NAMES: Halves = (
    _words(
        "Alice Bruno Chloe David Elena Felix Grace Henry Irene Jonas Karen Louis Amira Boris Carla Diego Emil Fiona "
        "Gavin Hana Ivo Julia Kenji Lena"
    ),
    _words(
        "Maria Nolan Olivia Peter Quinn Rosa Simon Tessa Ulric Vera Walter Yvonne Marek Nadia Oscar Paula Rashid Sonja "
        "Tomas Uma Viktor Wanda Xenia Zoltan"
    ),
)
PLACES: Halves = (
    ("kitchen", "garage", "library", "cellar", "garden", "attic", "studio", "harbour"),
    ("office", "museum", "barn", "tower", "chapel", "workshop", "station", "orchard"),
)
# One key, one value, which comes last and shortly after its key.
NEEDLES: Halves = (
    (
        "The special magic {kind} of {key} is {value}.",
        "Remember that the secret {kind} of {key} is {value}.",
        "The {kind} to be told to whoever asks about {key} is {value}.",
        "By agreement the {kind} of {key} is {value}.",
    ),
    (
        "Note for later: the locker {kind} for {key} reads {value}.",
        "In the register, the {kind} of {key} reads {value}.",
        "The label with the {kind} of {key} shows {value}.",
        "Filed as the {kind} of {key}: {value}.",
    ),
)
# How answers begin; those about needles begin as the needle does.
MANY_VALUES_ANSWERS: Halves = (
    ("The {kind}s for {key} are {given} and", "For {key} the text gives the {kind}s {given} and"),
    ("{key} has the {kind}s {given} and", "Recorded for {key}: {given} and"),
)
SUMMARY_ANSWERS: Halves = (("In short:", "The document says:"), ("Summary:", "Briefly:"))
KINDS: Halves = (("number", "code", "word"), ("number", "code", "word"))  # what is asked for; shared, values are not
NOISE: Halves = (
    (
        "The river runs slowly past the old mill. A boat drifts by and nobody is on board.",
        "Clouds gather over the hills. By noon they have gone again and the air is clear.",
        "The shop opens at nine. The owner sweeps the steps and puts out two chairs.",
    ),
    (
        "Snow lies on the roofs. Children walk to school and the bus is late once more.",
        "A cat sleeps on the wall. The clock strikes four and the market closes for the day.",
        "The train stops between two fields. People look out of the windows and wait.",
    ),
)
# Variable tracking: how a value or variable passes on to the next one.
LINKS: Halves = (
    (" => ", " is put into ", " goes to ", " feeds "),
    (" -> ", " is copied to ", " moves to ", " fills "),
)
# Generated facts: relations between two people, each as it is told and as it is asked; then where something lies.
RELATIONS: tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]] = (
    (
        ("{first} shares a desk with {second}.", "the person who shares a desk with {name}"),
        ("{first} takes lessons from {second}.", "the teacher of {name}"),
        ("{first} once borrowed a bicycle from {second}.", "the one who lent a bicycle to {name}"),
        ("{first} sends a card to {second} every year.", "the person to whom {name} sends cards"),
    ),
    (
        ("{first} always travels with {second}.", "the travel companion of {name}"),
        ("{first} pays the rent to {second}.", "the person who receives the rent of {name}"),
        ("{first} plays chess against {second}.", "the chess partner of {name}"),
        ("{first} wrote a book together with {second}.", "the co-author of {name}"),
    ),
)
ENDS: tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]] = (
    (
        ("The spare key is kept by {name} in the {place}.", "Where is the spare key kept by {who}?"),
        ("The bicycle was put by {name} in the {place}.", "In which place was the bicycle put by {who}?"),
        ("The evenings are spent by {name} in the {place}.", "Where are the evenings spent by {who}?"),
        ("A letter was found by {name} in the {place}.", "Please say where a letter was found by {who}."),
        ("The ladder is stored by {name} in the {place}.", "Name the place in which the ladder is stored by {who}."),
        ("Breakfast is eaten by {name} in the {place}.", "Find out where breakfast is eaten by {who}."),
        ("The meeting was held by {name} in the {place}.", "Which place was the meeting held in by {who}?"),
        ("A coat was lost by {name} in the {place}.", "A coat was lost by {who}. Where did that happen?"),
    ),
    (
        ("The notebook was hidden by {name} in the {place}.", "In what place was the notebook hidden by {who}?"),
        ("An umbrella was left by {name} in the {place}.", "Where was an umbrella left by {who}?"),
        ("Pictures are painted by {name} in the {place}.", "Where are pictures painted by {who}?"),
    ),
)
SECTION_MARKS: Halves = (("Section {mark}:", "[{mark}]", "== {mark} =="), ("Part {mark}.", "<{mark}>", "## {mark}"))
FILE_HEADS: Halves = (("# file: {name}", "# ==== {name} ===="), ("# path: {name}", "# --- {name} ---"))
CLASSES: dict[str, Halves] = {
    "animal": (
        ("horse", "otter", "eagle", "whale", "tiger", "goose"),
        ("camel", "robin", "shark", "zebra", "mouse", "raven"),
    ),
    "fruit": (
        ("apple", "mango", "peach", "grape", "lemon", "melon"),
        ("cherry", "banana", "papaya", "orange", "plum", "fig"),
    ),
    "colour": (
        ("red", "green", "purple", "white", "brown", "pink"),
        ("blue", "yellow", "black", "beige", "grey", "violet"),
    ),
    "metal": (
        ("iron", "copper", "zinc", "silver", "lead", "nickel"),
        ("gold", "tin", "cobalt", "steel", "bronze", "titanium"),
    ),
    "tool": (
        ("saw", "drill", "wrench", "chisel", "pliers", "file"),
        ("spade", "axe", "rake", "shovel", "trowel", "clamp"),
    ),
    "drink": (
        ("coffee", "cider", "cocoa", "juice", "milk", "water"),
        ("tea", "wine", "beer", "lemonade", "soda", "punch"),
    ),
}
LABELS: Halves = (("A", "B", "C", "D", "E", "F"), ("1", "2", "3", "4", "5", "6"))  # in place of the classes' names
