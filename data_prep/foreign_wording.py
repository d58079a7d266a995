"""How the retrieval kinds of the foreign evaluation set say and ask a fact: two halves each, validation and test.

In a phrase `{value}` is what is asked for; `{who}`, `{place}`, `{thing}` and so on are drawn beside it.
"""

from typing import NamedTuple, TypeAlias


class Phrase(NamedTuple):
    """A fact, the question about it, how the reply begins, and of which sort the value is. The reply ends in the words
    that come before the value in the fact, where there are any, so that a model has the value to find and not its form.
    """

    fact: str
    question: str
    prefix: str
    sort: str = "number"


class Several(NamedTuple):
    """Facts of one form about several people. With `follow`, the fact links a person to a thing or place (`link`),
    and `follow` links that to the value.
    """

    fact: str
    question: str
    prefix: str
    sort: str = "word"
    follow: str = ""
    link: str = ""


Phrases: TypeAlias = tuple[tuple[Phrase, ...], tuple[Phrase, ...]]
Texts: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]

PASS_KEY: Phrases = (
    (
        Phrase(
            "Note for later: the vault near {place} opens for nobody but a bearer of {value}.",
            "Which pass phrase does one bear to open the vault?",
            "The vault opens for nobody but a bearer of",
        ),
        Phrase(
            "Commit this to memory, you will need it: the night watch lets nobody through without {value}.",
            "Give me the countersign of the night watch.",
            "The night watch lets nobody through without",
        ),
        Phrase(
            "One line matters here: to cross the barrier, one gives the code {value}.",
            "Which code does one give to cross the barrier?",
            "To cross the barrier, one gives the code",
        ),
        Phrase(
            "Today you get in by typing {value}; do not lose it.",
            "How does today's pass key read?",
            "Today you get in by typing",
        ),
        Phrase(
            "A scribbled margin claims the strongbox opens with {value}.",
            "With what does the strongbox open, if the scribbled margin is right?",
            "If the margin is right, the strongbox opens with",
        ),
        Phrase(
            "Entry was granted to anyone whose slip bore the mark {value}.",
            "Which mark had a slip to bear for entry?",
            "Entry was granted to anyone whose slip bore the mark",
        ),
    ),
    (
        Phrase(
            "Keep in mind that the hatch unlocks once you enter {value}.",
            "What do you enter so that the hatch unlocks?",
            "The hatch unlocks once you enter",
        ),
        Phrase(
            "Hidden instruction: hand the guard the token {value}. Please retain it.",
            "Please repeat the token from the hidden instruction.",
            "One has to hand the guard the token",
        ),
        Phrase(
            "An archivist whispers: the alarm is disarmed with {value}.",
            "Tell me what disarms the alarm, going by the archivist.",
            "Going by the archivist, the alarm is disarmed with",
        ),
        Phrase(
            "Should anyone challenge us, we settled on the pass key {value}.",
            "Which pass key did we settle on?",
            "We settled on the pass key",
        ),
        Phrase(
            "Before the engine will start, its panel wants the code {value}.",
            "Which code is wanted before the engine will start?",
            "Before the engine will start, its panel wants the code",
        ),
        Phrase(
            "To help us into the crypt, somebody carved the sign {value} over the doorway.",
            "Which sign did somebody carve over the doorway?",
            "Over the doorway somebody carved the sign",
        ),
    ),
)
FILLER: Texts = (
    (
        "Gulls circle the harbour. A crate is lifted, a crate is lowered. The tide comes in and the tide runs out. "
        "Nothing else happens on the quay.",
        "Rain falls on the slates. Rain runs along the gutter and into the barrel. The barrel fills, spills over and "
        "waits for more rain.",
        "We walk to the mill and we walk back again. The path bends left, then right. Dust settles on our shoes, and "
        "then we set out once more.",
    ),
    (
        "Snow lies on the pass. The carts climb slowly, rest at the hut and roll down into the valley. Tomorrow they "
        "will climb again.",
        "A loom clacks in the attic. Thread over, thread under, thread over. The cloth grows by a hand's width and the "
        "weaver hums the same tune.",
        "Bees leave the hive at dawn. They visit clover, they visit thyme, and they come home heavy. The meadow looks "
        "just as it did before.",
    ),
)
NEEDLE: Phrases = (
    (
        Phrase(
            "On the night ferry, {who} always books cabin {value}.",
            "Which cabin does {who} book on the night ferry?",
            "On the night ferry, {who} always books cabin",
        ),
        Phrase(
            "{who} tucked the spare {thing} under a loose stone close to {value}.",
            "Close to what did {who} tuck the spare {thing} under a stone?",
            "{who} tucked the spare {thing} under a loose stone close to",
            "place",
        ),
        Phrase(
            "The duplicate made for {who} was filed by the locksmith as entry {value}.",
            "As which entry did the locksmith file the duplicate for {who}?",
            "The duplicate made for {who} was filed as entry",
        ),
        Phrase(
            "After hours of bidding, {who} left the auction with nothing but a {value}.",
            "With what did {who} leave the auction?",
            "{who} left the auction with nothing but a",
            "thing",
        ),
        Phrase(
            "Backstage, everybody calls {who} by the nickname {value}.",
            "By which nickname is {who} called backstage?",
            "Backstage, everybody calls {who} by the nickname",
            "word",
        ),
        Phrase(
            "A brass plate says that the pew of {who} has number {value}.",
            "Which number has the pew of {who}?",
            "The pew of {who} has number",
        ),
    ),
    (
        Phrase(
            "For the regatta, {who} was given a boat with sail number {value}.",
            "Which sail number had the boat given to {who}?",
            "{who} was given a boat with sail number",
        ),
        Phrase(
            "{who} proposed to hold next year's beekeeping fair at {value}.",
            "Where would {who} like next year's beekeeping fair to be held?",
            "{who} proposed to hold next year's beekeeping fair at",
            "place",
        ),
        Phrase(
            "Out of sheer gratitude the baker made {who} a cake shaped like a {value}.",
            "What was the cake for {who} shaped like?",
            "The baker made {who} a cake shaped like a",
            "thing",
        ),
        Phrase(
            "The parrot belonging to {who} is known as {value}.",
            "As what is the parrot of {who} known?",
            "The parrot belonging to {who} is known as",
            "word",
        ),
        Phrase(
            "Last May the surveyor marked the hedge of {who} with peg {value}.",
            "With which peg was the hedge of {who} marked?",
            "The surveyor marked the hedge of {who} with peg",
        ),
        Phrase(
            "In the choir's archive, the song by {who} has shelf mark {value}.",
            "What shelf mark has the song by {who} in the choir's archive?",
            "In the choir's archive, the song by {who} has shelf mark",
        ),
    ),
)
SEVERAL: tuple[tuple[Several, ...], tuple[Several, ...]] = (
    (
        Several(
            "Among the volunteers, {who} chose the codename {value}.",
            "List every codename the volunteers chose, in order of appearance.",
            "In order of appearance, they chose the codename",
        ),
        Several(
            "Ballot paper: {who} gives one vote to the {value}.",
            "Which mascots got votes? Start with the earliest vote.",
            "Starting with the earliest, they gave one vote to the",
        ),
        Several(
            "Raffle: for {who} they drew ticket {value}.",
            "Several raffle tickets were drawn. Which one was for {who}?",
            "For {who} they drew ticket",
            "number",
        ),
        Several(
            "{who} will spend the thaw at {value}.",
            "Where will {who}, of all the people mentioned, spend the thaw?",
            "{who} will spend the thaw at",
            "place",
        ),
        Several(
            "{who} carries the {link} on parade days.",
            "Think of what {who} carries on parade days: in which locker is it stored?",
            "What {who} carries is stored in locker",
            "number",
            "The {link} is stored in locker {value}.",
            "thing",
        ),
        Several(
            "{who} trained under the master of {link}.",
            "Which motto has the place whose master trained {who}?",
            "Over the gate of that place one reads the motto",
            "word",
            "Over the gate of {link} one reads the motto {value}.",
            "place",
        ),
    ),
    (
        Several(
            "During the roll call, {who} replied with the word {value}.",
            "Write down all the replies of the roll call, first to last.",
            "First to last, they replied with the word",
        ),
        Several(
            "Seed list: {who} ordered a packet of {value}.",
            "What was ordered on the seed list? Name each item, first to last.",
            "First to last, people ordered a packet of",
        ),
        Several(
            "The pigeon of {who} wears ring {value}.",
            "Which of the rings does the pigeon of {who} wear?",
            "The pigeon of {who} wears ring",
            "number",
        ),
        Several(
            "For the lantern walk, {who} waits at {value}.",
            "Everyone waits somewhere for the lantern walk. Where does {who} wait?",
            "For the lantern walk, {who} waits at",
            "place",
        ),
        Several(
            "{who} won the {link} at cards.",
            "Recall the prize {who} won at cards. Under which lot was it insured?",
            "The prize {who} won was insured under lot",
            "number",
            "The {link} was insured under lot {value}.",
            "thing",
        ),
        Several(
            "{who} rents the rooms over {link}.",
            "{who} rents rooms. Which word is painted on that building?",
            "On that building one finds in white paint the word",
            "word",
            "On {link} one finds in white paint the word {value}.",
            "place",
        ),
    ),
)
JSON_QUESTIONS: Texts = (
    (
        "Look up the entry {key} and report what it holds.",
        "Under {key}, which value do you find?",
        "Read off the right-hand side of {key}.",
        "Return whatever {key} maps to, and nothing else.",
        "I need one item of this object, namely {key}.",
    ),
    (
        "Fetch me the content of field {key}.",
        "Which value has been assigned to {key}?",
        "Search the object for {key}, then copy its partner.",
        "If a program indexed this with {key}, what would come back?",
        "Extract {key} from the data above.",
    ),
)
JSON_LEADS: Texts = (
    ("", "Dump of the registry:\n", "A configuration, as it was exported:\n"),
    ("", "Snapshot of our lookup table:\n", "The service responded with:\n"),
)
