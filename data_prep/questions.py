"""What the generators ask. Pairs of halves as in wording.py; training has many phrasings, because a router sees little
more of a question than its last tokens and must know its kind in words that it has not met.
"""

from .wording import Halves

NEEDLE_QUESTIONS: Halves = (
    (
        "What is the {kind} for {key}? Reply with the {kind} only.",
        "Which {kind} belongs to {key}? Give nothing else.",
        "Look up {key} in the text: what {kind} is given for it? Answer briefly.",
        "State the {kind} of {key} exactly as it appears in the text.",
        "Please find the {kind} of {key} and write nothing but it.",
        "The text mentions a {kind} for {key}. Which is it?",
        "For {key}, what is the {kind}?",
        "Can you tell which {kind} was noted for {key}?",
        "What was the {kind} of {key} again?",
        "Give the {kind} of {key}.",
        "{key}: which {kind} goes with it in the text above?",
        "Search the text for {key} and report its {kind}.",
        "I forgot the {kind} of {key}. Please look it up for me.",
        "According to the text, the {kind} for {key} is what?",
        "Only one {kind} is linked with {key}. Say which one, without a sentence around it.",
        "Extract the {kind} of {key}.",
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
        "There is more than one {kind} for {key}. Please name them all in the order in which they come up.",
        "Find all the {kind}s that the text has for {key} and list them.",
        "For {key}, list every {kind}, the earliest first.",
        "How do the {kind}s of {key} read? Put commas between them.",
        "Give the full list of {kind}s for {key}.",
        "Enumerate the {kind}s of {key} as they appear.",
        "Which are the {kind}s of {key}? All of them, please, as a list with commas.",
        "Search for {key} and report all its {kind}s in sequence.",
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
        "Find the {kind} of each: {keys}. Reply with a list.",
        "I am looking for the {kind}s of {keys}. Please list them in that order.",
        "Report one {kind} after the other for {keys}.",
        "{keys}: what are their {kind}s according to the text?",
        "According to the text, which {kind}s go with {keys}? Commas between them, please.",
        "Extract the {kind}s of {keys}, one for each, in order.",
        "One {kind} each is noted for {keys}. List these {kind}s.",
        "Please answer with the {kind}s of {keys} and nothing besides.",
    ),
    (
        "Give me the {kind} of every item here, keeping the order and using commas: {keys}.",
        "Which {kind}s belong to {keys}, respectively? Divide them by commas.",
        "For {keys}: write the recorded {kind}s in this sequence, comma by comma.",
    ),
)
TRACK: Halves = (
    (
        "Which variables hold {value} in the end? Write the chain as here: {chain}.",
        "Find every variable that was given {value}, directly or through others, in the form {chain}, but for {value}.",
        "List the way of {value} through the variables, in the manner of {chain}.",
        "Which variables end up with {value}? The answer should look like {chain}.",
        "Follow {value} from one variable to the next and show it like {chain}.",
        "Where does {value} go? Write all its steps in the style of {chain}.",
        "What chain of variables begins with {value}? An example of the form: {chain}.",
        "Report every variable that gets {value}, in order, formatted as {chain}.",
        "With {chain} as a pattern, write the chain that {value} starts.",
        "Find the chain of {value}. For another value it would read {chain}.",
        "Name in order the variables that received {value}, written like {chain}.",
    ),
    (
        "Through which variables does {value} pass? Answer in the form of {chain}.",
        "{value} was handed from variable to variable. Note the whole route, as was done for {chain}.",
        "Trace {value} from its start to its last variable, as in {chain}.",
    ),
)
COPY_QUESTIONS: Halves = (
    (
        "Copy the text under {mark} word for word.",
        "Repeat exactly what is written under the mark {mark}, and nothing else.",
        "Write out the passage marked {mark} without any change.",
        "Please copy {mark} in full.",
        "I need the exact text of the part called {mark}.",
        "Print the text that appears under {mark}, with nothing added.",
        "Look for {mark} and type its text once more, unchanged.",
        "Which text does {mark} hold? Repeat it in full.",
        "Recite {mark} from the document above.",
        "Return the contents of {mark} exactly as they are.",
        "Find {mark} and repeat the words below it.",
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
        'Which word fits the gap according to the text? "{sentence}"',
        '"{sentence}" What is the missing word?',
        'Find this sentence in the passages and give the word that is left out: "{sentence}"',
        'The following is from the text, with a word removed: "{sentence}" Restore that word.',
        'Look up the sentence and say which word belongs into it: "{sentence}"',
        '"{sentence}" One word is hidden. Please find it in the passages.',
        'In "{sentence}" a word is missing. What was it?',
        'Which single word of the text is replaced by the gap in "{sentence}"?',
    ),
    (
        'Complete this quotation by its missing word: "{sentence}" Give the word alone.',
        'According to the text, which word fills the blank? "{sentence}"',
        'Which word fills the blank in this quotation? "{sentence}"',
    ),
)
REST: Halves = (
    (
        'How does the sentence that begins with "{start}" continue? Write its next words.',
        'Go on with the sentence of the passages that starts "{start}".',
        'Find the sentence opening with "{start}" and give what comes then.',
        '"{start}" is how a sentence of the text begins. Finish it as there.',
        'Look up "{start}" and copy the words after it.',
        'In the passages there is a sentence with the start "{start}". What are its next words?',
        'Please finish this sentence from the text: "{start}"',
        'Repeat what the text says right after "{start}".',
        'What does the text say next after the words "{start}"?',
        'Search for "{start}" and continue from there as the passages do.',
        'Take up the text at "{start}" and write some more of its words.',
    ),
    (
        'One sentence above has the beginning "{start}". Quote what comes after that.',
        'Quote the words that follow "{start}" in the passages.',
        'Going by the text, what follows "{start}"?',
    ),
)
CONTINUE: Halves = (
    (
        "Continue the text above.",
        "Go on with this document.",
        "Write the next sentences of the document.",
        "What could come next in this text?",
        "Please extend the document in the same style.",
        "Add another paragraph.",
        "Keep writing from where the document ends.",
        "Finish the last passage in your own words.",
        "Imagine the rest of this document and write it.",
        "The document breaks off here. Take it further.",
        "Produce the sentences that come after the end of the text.",
    ),
    ("Write what follows in this text.", "How does the text proceed? Write on.", "Carry this passage on."),
)
SUMMARISE: Halves = (
    (
        "Summarise the last document in a few sentences.",
        "What is the last document about? Describe it in short.",
        "Write an introduction to the last document.",
        "Please sum up the last document.",
        "State the main points of the last document.",
        "Tell me the gist of the last document.",
        "How would you present the last document to a reader in three sentences?",
        "What should one know about the last document?",
        "Boil the last document down to its essentials.",
        "Draft an abstract for the last document.",
        "Explain briefly what the last document covers.",
    ),
    (
        "Give a short account of the final document.",
        "In a few words, what does the final document deal with?",
        "Write the paragraph that should open the final document.",
    ),
)
COMPLETE: Halves = (
    (
        "Write the next lines of this file.",
        "Complete the code.",
        "What are the next lines of the last file?",
        "Please finish this function.",
        "Add the code that comes next.",
        "Predict how the last file continues.",
        "Fill in what is missing at the end of the code.",
        "Program the following lines in the same style.",
        "The file ends too early. Write more of it.",
        "Implement the part that belongs here.",
        "Type the code that belongs after the last line.",
    ),
    ("Continue this source file.", "Go on with the code where it stops.", "Extend the final file by some lines."),
)
SHOTS: Halves = (
    (
        "Word: {word}\nClass: {label}",
        "{word} is of class {label}",
        "Input {word}, output {label}",
        "{word}: {label}",
        "The category of {word} is {label}",
        "<{word}> ~ {label}",
        "Example: {word} / Tag: {label}",
        "{word} = {label}",
        "Text: {word} || Type: {label}",
        "- {word} goes under {label}",
        "{word} ==> {label}",
        "Case {word}; result {label}",
        "The answer for {word} was {label}",
        "Noun: {word}, sort: {label}",
        "We put {word} with {label}",
        "{word} counts as {label}",
    ),
    ("Item {word} -> group {label}", "{word} | {label}", "Q: {word} A: {label}"),
)
SHOT_QUESTIONS: Halves = (  # the same places as in SHOTS
    (
        "Add the same for the word {word}.",
        "Of what class is {word}? Say it as above.",
        "Give the line with the input {word}.",
        "Continue with {word}.",
        "Please classify {word} like the examples.",
        "What would the entry for {word} look like?",
        "Tag {word} in the same way.",
        "Apply the pattern to {word}.",
        "Text: {word}",
        "Where does {word} go, by these examples? Answer in the same form.",
        "Now the same thing with {word}.",
        "Next case: {word}.",
        "What is the answer for {word}?",
        "Judge {word} in the way of the lines above.",
        "What do we put {word} with? Keep to the form.",
        "Extend the list by {word}.",
    ),
    (
        "To which group does the item {word} belong? One line as above.",
        "Write the line of {word}.",
        "One more for {word}, please.",
    ),
)
