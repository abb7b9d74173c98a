"""Words, names and numbers that synthetic tasks are made of. Knows nothing but random numbers.

The lists are this project's own. No full name is part of another one, and no name has an apostrophe.
"""

from __future__ import annotations

from random import Random
from uuid import UUID

ADJECTIVES = """
able ancient bitter bold brave brief bright broad calm careful cheerful clean clever cold common cool crisp curious damp dark deep dry dusty eager early
easy empty even fair faint famous fancy fierce fine firm flat fond free fresh full gentle glad golden grand grateful gray great green happy hard heavy hollow
honest humble icy idle jolly keen kind large late lazy light little lively lonely long loose loud lucky mellow merry mild misty modest narrow neat nimble noble
odd open pale patient plain pleasant polite proud pure quick quiet rapid rare ready rich rough round royal rusty salty sharp short shy silent silver
simple slender slow small smooth soft solid sour spare steady steep still stout strange strong sudden sunny sweet swift tall tender thin tidy tiny
tough true vast vivid warm weary wet wide wild wise witty wooden worthy yellow young
""".split()

NOUNS = """
acorn anchor apple apron arrow badge barrel basket beach bell bench berry blanket boat bottle bowl branch bread brick bridge broom brush bucket button
cabin candle canyon carpet castle cave chain chair chapel cherry circle clock cloud coat comet copper corner cottage cradle creek crown curtain desk dish
door drum eagle engine falcon feather fence ferry fiddle field flag flame flute forest fountain garden gate glove hammer harbor harvest hat hedge helmet hill
honey horn island jacket jar kettle kitchen ladder lake lamp lantern leaf lemon letter lily lock market meadow mill mirror monkey moon mountain needle nest
oak ocean orchard otter oven paddle paper parrot pearl pebble pencil pepper piano pillow pine plate pocket pond puzzle quilt rabbit raft ribbon river robin
rocket roof rope sail sandal saddle shell shelf shovel signal sparrow spoon spring stable statue stone stove street table temple thimble ticket tower
trumpet tulip tunnel valley velvet village violin wagon walnut whistle willow window winter yard
""".split()

FIRST_NAMES = """
Agnes Albert Alice Amos Arthur Beatrice Bernard Bridget Caleb Cecilia Charlotte Clement Daphne Dorothy Edgar Eleanor Elmer Esther Felix Flora Frederick
Gideon Gloria Harold Harriet Henry Hugo Ingrid Isabel Jasper Josephine Julian Katherine Lawrence Leonard Lydia Magnus Margaret Martin Mildred Nathan Nora
Oliver Ophelia Oscar Patrick Philip Prudence Quentin Rachel Roland Rosamund Samuel Sylvia Theodore Ursula Victor Violet Walter Winifred
Adelaide Alistair Barnaby Benedict Camilla Christopher Constance Cyril Desmond Dominic Edmund Emmeline Ernest Evangeline Fergus Geoffrey Georgina Gregory
Gwendolyn Hector Herbert Hester Humphrey Imogen Jerome Leopold Lucinda Matilda Maurice Millicent Nicholas Penelope Percival Reginald Rupert Sebastian
Tabitha Tobias Vincent Wilfred
""".split()

LAST_NAMES = """
Abbott Alder Ashford Barlow Beckett Bishop Bradley Briggs Calloway Carver Chandler Crosby Dalton Danvers Drake Eastwood Ellery Fairfax Fletcher Gardner
Garrick Granger Hadley Harlow Hathaway Holloway Hutton Jarvis Kendrick Kingsley Lambert Langley Lockwood Marlow Mercer Merton Milburn Nolan Norwood Ogden
Osborne Paxton Pemberton Penrose Quincy Radford Ramsey Redfern Rowland Sawyer Selby Shelton Talbot Thornton Underhill Vickers Wainwright Walcott Weston
Yardley Aldridge Atwood Bancroft Bellamy Blackwood Bramwell Burnham Cavendish Clifton Colby Cromwell Davenport Denholm Dunstan Easton Everett Farnham
Fenwick Gladwin Goodwin Hamilton Hartley Hawthorn Ingram Jessop Kirkland Leighton Lydgate Mansfield Middleton Newbury Oakley Prescott Ridgeway Sheffield
Stanhope Sutherland Tremaine Whitaker Woodruff
""".split()

FULL_NAMES = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]

_PLACE_STARTS = "Bren Cal Dor Els Fen Gar Hal Ith Jor Kel Lor Mel Nar Or Pel Quer Ros Sel Tor Ul Vel Wen Yar Zan".split()
_PLACE_ENDS = "bury combe dale dene field garth haven holm ley march mere minster mouth nock ridge stead thorpe ton wick worth".split()


def two_words(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: Random) -> str:
    """Seven digits, the first not a zero."""
    return str(rng.randrange(10**6, 10**7))


def uuid4(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


def place(rng: Random) -> str:
    return rng.choice(_PLACE_STARTS) + rng.choice(_PLACE_ENDS)
