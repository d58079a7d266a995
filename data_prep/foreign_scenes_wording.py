"""Wording of the foreign evaluation set's last paragraphs and chats: two halves each, validation and test."""

from .foreign_wording import Phrase, Phrases, Texts

LAST_PARAGRAPH: Phrases = (
    (
        Phrase(
            "The prize for the tallest sunflower went to row {value}.",
            "Look at the final paragraph only: which row won the prize for the tallest sunflower?",
            "The prize for the tallest sunflower went to row",
        ),
        Phrase(
            "A postscript adds that {who} can be reached at {value}.",
            "The text ends with a postscript about {who}. Where can this person be reached?",
            "{who} can be reached at",
            "place",
        ),
        Phrase(
            "{who} brought to the farewell party a {value}.",
            "Right at the end a farewell party is mentioned. What did {who} bring to it?",
            "{who} brought to the farewell party a",
            "thing",
        ),
        Phrase(
            "The poster by {who} shows nothing but the word {value}.",
            "Which word, as the closing paragraph has it, does the poster by {who} show?",
            "The poster by {who} shows nothing but the word",
            "word",
        ),
        Phrase(
            "At closing time, the till of {who} held exactly {value}.",
            "How much did the till of {who} hold at closing time, going by the text's very end?",
            "At closing time, the till of {who} held exactly",
        ),
    ),
    (
        Phrase(
            "The bus that {who} missed carried the number {value}.",
            "The concluding paragraph speaks of a bus that {who} missed. Its number?",
            "The bus that {who} missed carried the number",
        ),
        Phrase(
            "{who} has since retired to a flat over {value}.",
            "Over what is the flat to which {who} retired? The last lines tell.",
            "{who} has since retired to a flat over",
            "place",
        ),
        Phrase(
            "In the cloakroom, {who} found an abandoned trunk, and in the trunk a {value}.",
            "What did {who} find in the trunk, as told just before this question?",
            "{who} found an abandoned trunk, and in the trunk a",
            "thing",
        ),
        Phrase(
            "To calm the crowd, {who} shouted one word: {value}.",
            "Near the end, which single word did {who} shout at the crowd?",
            "To calm the crowd, {who} shouted one word:",
            "word",
        ),
        Phrase(
            "{who} left town with a fine, in guilders, of {value}.",
            "How large was the fine of {who}? Only the ending matters.",
            "{who} left town with a fine, in guilders, of",
        ),
    ),
)
CLOSINGS: Texts = (
    ("And so to the end.", "A last remark.", "One more thing, before we close.", "Postscript.", "To finish:"),
    ("Finally, a footnote.", "Here the report ends.", "Some last lines.", "In closing.", "An afterthought."),
)
CHAT: Phrases = (
    (
        Phrase(
            "Hello! For your records, my customer code here is {value}. I brought some reading.",
            "By the way, can you recall my customer code?",
            "Your customer code here is",
        ),
        Phrase(
            "Good morning. My flatmate {who} left the bicycle at {value}; remind me when I ask. Reading first, please.",
            "Now, about the bicycle: where did {who} leave it?",
            "{who} left the bicycle at",
            "place",
        ),
        Phrase(
            "Hi, I want to buy {who} a {value} as a birthday present, but it stays between us. Shall we study now?",
            "Before I leave: what did I want to buy {who}?",
            "You want to buy {who} a",
            "thing",
        ),
        Phrase(
            "Our kitten listens to the name {value}, isn't that sweet? Anyway, I have homework.",
            "Do you still know the kitten's name?",
            "Your kitten listens to the name",
            "word",
        ),
        Phrase(
            "My train leaves from platform {value}, mind it for me. Until then I would like to learn something.",
            "It is nearly time. From which platform does my train leave?",
            "Your train leaves from platform",
        ),
    ),
    (
        Phrase(
            "Hey there, quick thing: the parcel's collection number is {value}. With that settled, let's read.",
            "Okay, I am at the counter. What collection number did I give you?",
            "The parcel's collection number is",
        ),
        Phrase(
            "Evening! {who} and I will meet at {value} tomorrow, don't let me forget. Could you help me revise?",
            "Lastly, where will I meet {who} tomorrow?",
            "{who} and you will meet at",
            "place",
        ),
        Phrase(
            "I finally sold {who} grandfather's {value}. What a relief. So, shall we continue with the manual?",
            "One question off topic: what did I sell {who}?",
            "You finally sold {who} grandfather's",
            "thing",
        ),
        Phrase(
            "Our quiz team is registered as {value} this season. I am preparing for the technology round.",
            "They have lost our papers. As what is our quiz team registered?",
            "Your quiz team is registered as",
            "word",
        ),
        Phrase(
            "The plumber's quote, in francs, is {value}; I say it so that I have it in writing. Now, to the manual.",
            "How many francs had the plumber quoted me?",
            "The plumber's quote, in francs, is",
        ),
    ),
)
REPLIES: Texts = (
    ("Of course, I will bear that in mind. What shall we read?", "Gladly. I have taken note of it.", "Sure, noted."),
    ("Understood, I have it. Where do we begin?", "Very well, I shall not forget.", "Consider it remembered."),
)
REQUESTS: Texts = (
    (
        "Please read me the next section.",
        "What does the handbook say after that?",
        "That helps. Give me another excerpt, a long one.",
        "Interesting! And the part that follows?",
        "I would like to hear more, from any chapter you like.",
    ),
    (
        "Show me a further passage.",
        "Could you quote the manual at length?",
        "Thanks, clear so far. Next piece, please.",
        "Fine. Pick a different topic and quote it in full.",
        "Keep reading to me, I am all ears.",
    ),
)
FAREWELLS: Texts = (
    ("That was a lot to take in, thank you.", "I have understood the last section, I believe.", "Lovely, that is it."),
    ("My head is full, so let us stop here.", "Great work, I feel prepared.", "Alright, the book can be shut now."),
)
