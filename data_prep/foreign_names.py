"""Names and nouns of the foreign evaluation set. Every table has two halves, for validation and for test, which share
nothing with each other nor with the tables of the training generators.
"""

from .foreign_wording import Texts


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


FIRST: Texts = (
    _words(
        "Ottoline Bertram Ximena Lucjan Perpetua Anselm Isolde Caspian Philippa Ruaridh Zdenka Ambrose Henrike Torvald "
        "Leocadia Fergal"
    ),
    _words(
        "Clementine Ignatius Solveig Barnaby Marguerite Tadeusz Oriane Leopold Winifred Desmond Yolanda Casimir "
        "Georgiana Lorcan Valeria Gustav"
    ),
)
LAST: Texts = (
    _words(
        "Abernethy Vostrikov Lindqvist Okonjo Tremayne Szabados Haverkamp Pellegrin Drummond Castellane Murtagh "
        "Wetherby Ishikura Bjarnason Delacourt Romanek"
    ),
    _words(
        "Ashdown Kowalczyk Fairweather Montclair Nakagawa Ravensdale Holmqvist Carrington Espinoza Thackeray Oyelaran "
        "Brandvold Lockhart Petrossian Wainwright Gallagher"
    ),
)
PLACES: Texts = (
    _phrases(
        "the salt warehouse, the ropewalk, the chapel ruins, the tram depot, the glasshouse, the signal tower, "
        "the cider press, the upper sluice, the boathouse, the quarry office, the weighbridge, the dovecote"
    ),
    _phrases(
        "the tannery, the pumping station, the bandstand, the lime kiln, the customs shed, the orangery, "
        "the ice cellar, the toll cottage, the windpump, the dry dock, the grain exchange, the watch house"
    ),
)
THINGS: Texts = (
    _phrases(
        "brass sextant, velvet cloak, porcelain thimble, cedar trunk, silver flute, tin whistle, walnut clock, "
        "painted fan, leather satchel, copper kettle, marble bust, woollen tapestry"
    ),
    _phrases(
        "pewter goblet, bamboo parasol, jade comb, birch canoe, crystal decanter, linen hammock, bronze sundial, "
        "granite mortar, silk banner, rosewood cello, wicker cradle, steel astrolabe"
    ),
)
WORDS: Texts = (
    _words(
        "heron tulip anvil saffron thistle juniper marzipan pelican rhubarb sandal zephyr walrus accordion bramble "
        "crocus drizzle eiderdown flagstone gherkin hollyhock inkwell jackdaw kiosk lobster mulberry nougat oatmeal "
        "paprika rucksack sycamore trombone vinegar"
    ),
    _words(
        "badger cinnamon dolphin fennel gondola hazelnut jasmine kestrel quince nutmeg stoat pomelo sorrel turnip "
        "vanilla yarrow acrobat bagpipe rivet dandelion earwig fiddle gooseberry harmonica igloo jigsaw kettledrum "
        "limpet moccasin nettle ostrich parsnip"
    ),
)
