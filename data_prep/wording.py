"""Words and templates of the generators. Everything is a pair of disjoint halves: the first for training, the second
for validation and test.
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
# One key, one value, which comes last and not far behind its key.
NEEDLES: Halves = (
    (
        "The special magic {kind} of {key} is {value}.",
        "Remember that the secret {kind} of {key} is {value}.",
        "The {kind} to be told to whoever asks about {key} is {value}.",
        "By agreement the {kind} that stands for {key} is {value}.",
    ),
    (
        "Note for later: the locker {kind} for {key} reads {value}.",
        "In the register, the {kind} of {key} reads {value}.",
        "The label with the {kind} of {key} shows {value}.",
        "Filed as the {kind} of {key}: {value}.",
    ),
)
NEEDLE_QUESTIONS: Halves = (
    (
        "What is the {kind} for {key}? Reply with the {kind} only.",
        "Which {kind} belongs to {key}? Give nothing else.",
        "Look up {key} in the text: what {kind} is given for it? Answer briefly.",
        "State the {kind} of {key} exactly as it stands in the text.",
    ),
    (
        "What {kind} does {key} have? Answer with it alone.",
        "Tell me the {kind} of {key}, just that.",
        "Somewhere above a {kind} is recorded for {key}. Write it down.",
        "I need the {kind} that goes with {key}; no explanation.",
    ),
)
MANY_VALUES: Halves = (
    (
        "List all {kind}s for {key} in the order of the text, separated by commas.",
        "Which {kind}s are given for {key}? Name every one, with commas between them.",
        "The text gives {key} several {kind}s. Write them one after the other with commas.",
    ),
    (
        "Write down each {kind} recorded for {key}, first to last, with commas.",
        "What are all the {kind}s of {key}? Keep their order and divide them by commas.",
        "Collect every {kind} that goes with {key} and join them by commas.",
    ),
)
MANY_KEYS: Halves = (
    (
        "What are the {kind}s for {keys}? Answer in this order, separated by commas.",
        "Look up {keys} and give their {kind}s in the same order with commas between.",
        "Name the {kind} of each of these, in turn and with commas: {keys}.",
    ),
    (
        "Give me the {kind} of every item here, keeping the order and using commas: {keys}.",
        "Which {kind}s belong to {keys}, respectively? Divide them by commas.",
        "For {keys}: write the recorded {kind}s in this sequence, comma by comma.",
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
# Variable tracking: how a value or variable passes on to the next one, and what is asked.
LINKS: Halves = (
    (" => ", " is put into ", " goes to ", " feeds "),
    (" -> ", " is copied to ", " moves to ", " fills "),
)
TRACK: Halves = (
    (
        "Which variables hold {value} in the end? Write the chain as here: {chain}.",
        "Find every variable that was given {value}, directly or through others, in the form {chain}, but for {value}.",
        "List the way of {value} through the variables, in the manner of {chain}.",
    ),
    (
        "Through which variables does {value} pass? Answer in the form of {chain}.",
        "{value} was handed from variable to variable. Note the whole route, as was done for {chain}.",
        "Trace {value} from its start to its last variable, as in {chain}.",
    ),
)
# Generated facts: relations between two people, each as it stands and as it is asked; then where something lies.
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
    ),
    (
        ("The notebook was hidden by {name} in the {place}.", "In what place was the notebook hidden by {who}?"),
        ("An umbrella was left by {name} in the {place}.", "Where was an umbrella left by {who}?"),
        ("Pictures are painted by {name} in the {place}.", "Where are pictures painted by {who}?"),
    ),
)
SECTION_MARKS: Halves = (("Section {mark}:", "[{mark}]", "== {mark} =="), ("Part {mark}.", "<{mark}>", "## {mark}"))
COPY_QUESTIONS: Halves = (
    (
        "Copy the text under {mark} word for word.",
        "Repeat exactly what stands under the mark {mark}, and nothing else.",
        "Write out the passage marked {mark} without any change.",
    ),
    (
        "Give the passage headed {mark} verbatim.",
        "Reproduce the text that follows {mark}, letter by letter.",
        "What precisely is written under {mark}? Quote all of it.",
    ),
)
GAPS: Halves = (
    (
        'Which word of the passages is missing here? "{sentence}" Answer with the word.',
        'A word was taken out of this sentence of the text: "{sentence}" Which one?',
        'Fill the gap as in the passages: "{sentence}" Reply with one word.',
    ),
    (
        'Complete this quotation by its missing word: "{sentence}" Give the word alone.',
        'Going by the text, what stands in place of the blank? "{sentence}"',
        'Name the word behind the blank of this quotation: "{sentence}"',
    ),
)
REST: Halves = (
    (
        'How does the sentence go on that begins with "{start}"? Write its next words.',
        'Go on with the sentence of the passages that starts "{start}".',
        'Find the sentence opening with "{start}" and give what comes then.',
    ),
    (
        'One sentence above has the beginning "{start}". Quote what comes after that.',
        'Quote the words behind "{start}" in the passages.',
        'Going by the text, what follows "{start}"?',
    ),
)
CONTINUE: Halves = (
    ("Continue the text above.", "Go on with this document.", "Write the next sentences of the document."),
    ("Write what follows in this text.", "How does the text proceed? Write on.", "Carry this passage on."),
)
SUMMARISE: Halves = (
    (
        "Summarise the last document in a few sentences.",
        "What is the last document about? Describe it in short.",
        "Write an introduction to the last document.",
    ),
    (
        "Give a short account of the final document.",
        "In a few words, what does the final document deal with?",
        "Write the paragraph that should open the final document.",
    ),
)
COMPLETE: Halves = (
    ("Write the next lines of this file.", "Complete the code.", "What are the next lines of the last file?"),
    ("Continue this source file.", "Go on with the code where it stops.", "Extend the final file by some lines."),
)
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
SHOTS: Halves = (
    ("Word: {word}\nClass: {label}", "{word} is of class {label}", "Input {word}, output {label}"),
    ("Item {word} -> group {label}", "{word} | {label}", "Q: {word} A: {label}"),
)
SHOT_QUESTIONS: Halves = (  # the same places as in SHOTS
    (
        "Add the same for the word {word}.",
        "Of what class is {word}? Say it as above.",
        "Give the line with the input {word}.",
    ),
    (
        "To which group does the item {word} belong? One line as above.",
        "Write the line of {word}.",
        "One more for {word}, please.",
    ),
)
