"""Wording of the foreign evaluation set's plays: two halves each, validation and test."""

from .foreign_wording import Phrase, Phrases, Texts

# Of a play, `{value}: ...` is a line of a character who speaks only once.
PLAY: Phrases = (
    (
        Phrase(
            "Rumour has it that the {thing} is now the property of {value}.",
            "According to rumour, whose property is the {thing}?",
            "Rumour has it that the {thing} is now the property of",
            "who",
        ),
        Phrase(
            "Did you hear? {who} has taken lodgings at {value}.",
            "At which place has {who} taken lodgings?",
            "{who} has taken lodgings at",
            "place",
        ),
        Phrase(
            "Last winter {who} pawned, of all things, a {value}.",
            "What did {who} pawn last winter?",
            "Last winter {who} pawned, of all things, a",
            "thing",
        ),
        Phrase(
            "The letter for {who} is sealed with the sign of the {value}.",
            "With the sign of what is the letter for {who} sealed?",
            "The letter for {who} is sealed with the sign of the",
            "word",
        ),
        Phrase(
            "{value}: My lords, {event}!",
            "Which character brings the news that {event}?",
            "The news is brought by",
            "who",
        ),
        Phrase(
            "Have you not heard that {event}? So says {value}.",
            "Name the one who says that {event}.",
            "So says",
            "who",
        ),
    ),
    (
        Phrase(
            "Everyone at court agrees: the {thing} was inherited by {value}.",
            "Which person inherited the {thing}, as the court agrees?",
            "The court agrees: the {thing} was inherited by",
            "who",
        ),
        Phrase(
            "My cousin saw {who} asleep in a bed of straw at {value}.",
            "Where was {who} seen asleep?",
            "{who} was seen asleep in a bed of straw at",
            "place",
        ),
        Phrase(
            "Poor {who}! Of the dowry nothing is left but a {value}.",
            "What is left of the dowry of {who}?",
            "Poor {who}! Of the dowry nothing is left but a",
            "thing",
        ),
        Phrase(
            "They call the horse of {who} by the pet name {value}.",
            "What do they call the horse of {who}?",
            "They call the horse of {who} by the pet name",
            "word",
        ),
        Phrase(
            "{value}: Make way, make way, {event}!",
            "From whom do we learn that {event}?",
            "We learn it from",
            "who",
        ),
        Phrase(
            "It is whispered that {event}, and the source is {value}.",
            "Which source is there for the whisper that {event}?",
            "It is whispered that {event}, and the source is",
            "who",
        ),
    ),
)
EVENTS: Texts = (
    (
        "the bridge at the ford has been washed away",
        "the bishop will not come to dinner",
        "three ships were sighted off the cape",
        "the harvest of the lower fields has burned",
        "the judge has taken a bribe",
        "our neighbours have closed their border",
    ),
    (
        "the duke has fallen from his horse",
        "the wells of the upper town are dry",
        "a comet was seen over the abbey",
        "the miners have laid down their tools",
        "the crown jewels are made of glass",
        "the ambassador left without a farewell",
    ),
)
OPENINGS: Texts = (
    (
        "Ah, well.",
        "Believe me,",
        "Hush!",
        "By my beard,",
        "Let us be honest:",
        "Good heavens,",
        "As my aunt used to say,",
        "Listen,",
        "Forgive me,",
        "Upon my word,",
        "I wonder whether",
        "Enough of this;",
    ),
    (
        "Pray,",
        "Come now,",
        "Mercy!",
        "In truth,",
        "Do not mock me:",
        "Alas,",
        "As every fool knows,",
        "Quiet,",
        "Allow me,",
        "On my honour,",
        "It seems to me",
        "No more of that;",
    ),
)
BODIES: Texts = (
    (
        "the soup is getting cold and the guests are late.",
        "nobody mends a roof while the sun shines.",
        "we shall dance until the candles are spent.",
        "your brother owes me an apology and a new hat.",
        "a quarrel at breakfast spoils the whole day.",
        "the musicians want their wages before the wedding.",
        "I have counted these stairs more often than my blessings.",
        "patience is a virtue that I never could afford.",
        "there is a draught in here, and it comes from your stories.",
        "the moon was larger when we were young.",
        "an honest man would have knocked first.",
        "my feet ache, and so does my conscience.",
        "one should never argue with a cook.",
        "the garden needs weeding more than we need poetry.",
        "you speak like a man who has not read the contract.",
        "somebody must feed the dogs before nightfall.",
    ),
    (
        "the wine has turned and so has the company.",
        "a borrowed coat is never quite warm.",
        "the stage is too small for both our tempers.",
        "your sister laughs at funerals and weeps at fairs.",
        "no letter ever arrived sooner for being awaited.",
        "we might play another round before the rain.",
        "I have grown old in this waiting room.",
        "silence costs less than a lawyer.",
        "the carpets have heard worse than that.",
        "spring will find us here, still packing.",
        "a polite thief would have closed the window.",
        "my memory is a sieve, but a charming one.",
        "never lend a ladder to a poet.",
        "the portrait has more manners than its owner.",
        "you promised me a walk and gave me a sermon.",
        "let the kettle decide when we leave.",
    ),
)
DIRECTIONS: Texts = (
    (
        "(A bell rings. They wait until it stops.)",
        "(The servants clear the table.)",
        "SECOND ACT. The same room, at dusk.",
        "(Laughter from the courtyard.)",
        "THIRD ACT. A road lined with poplars.",
    ),
    (
        "[Thunder. All look up.]",
        "[Two porters cross with a chest.]",
        "Scene: the terrace, early morning.",
        "[A dog barks and is silenced.]",
        "Scene: a corridor hung with portraits.",
    ),
)
