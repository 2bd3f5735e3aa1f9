"""The facts behind the quickstart model, and the sentences made from them.

Three things live here, all plain data and pure functions (standard library only):

1. tables of facts, each checked by eye: countries, words, animals, elements, arithmetic and so on;
2. `STATEMENTS`: for every relation, the wordings in which the base model reads a fact. They are
   plain statements: no questions, no instructions. A small model can state a fact in a new form
   only if it has read the fact in many wordings, orders and contexts (Allen-Zhu & Li 2023, Physics
   of Language Models 3.1). Hence the many paraphrases, in both directions, and the several kinds of
   documents in `Facts.document`;
3. `INSTRUCTIONS`: for some of the relations, the wordings in which a person may ask for a fact, and
   the form of the answer. Only the fine-tuning sample is made from these.

`scripts/build_quickstart.py` trains the base on (2) and writes the samples from (3). Every fact
belongs to one entity (`Fact.entity`). A held-out entity is left out of the training sample with all
its relations.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fact:
    """One fact: the `relation` of `x` is `y`; `extra` holds the other words that its wordings need."""

    relation: str
    x: str
    y: str
    entity: str
    """What is held out as a whole: a country, a word (with its opposite), an element, a pair of
    numbers."""
    extra: dict[str, str] = field(default_factory=dict, hash=False, compare=False)

    def words(self) -> dict[str, str]:
        """What a wording may name: {x}, {y}, and both with an indefinite article: {ax}, {ay}."""
        return {
            "x": self.x,
            "y": self.y,
            "ax": with_article(self.x),
            "ay": with_article(self.y),
            **self.extra,
        }


def with_article(noun: str) -> str:
    """`an apple`, `a mouse`; judged by the first letter, which is right for every noun in the
    tables."""
    return ("an " if noun[0] in "aeio" else "a ") + noun


# ---- tables

# country | capital | continent | main language | currency; "-" where there is no single short
# answer
COUNTRIES = """
France|Paris|Europe|French|euro
Germany|Berlin|Europe|German|euro
Italy|Rome|Europe|Italian|euro
Spain|Madrid|Europe|Spanish|euro
Portugal|Lisbon|Europe|Portuguese|euro
Austria|Vienna|Europe|German|euro
Greece|Athens|Europe|Greek|euro
Ireland|Dublin|Europe|English|euro
Finland|Helsinki|Europe|Finnish|euro
Belgium|Brussels|Europe|-|euro
the Netherlands|Amsterdam|Europe|Dutch|euro
Norway|Oslo|Europe|Norwegian|krone
Sweden|Stockholm|Europe|Swedish|krona
Denmark|Copenhagen|Europe|Danish|krone
Iceland|Reykjavik|Europe|Icelandic|krona
Poland|Warsaw|Europe|Polish|zloty
Hungary|Budapest|Europe|Hungarian|forint
Romania|Bucharest|Europe|Romanian|leu
Bulgaria|Sofia|Europe|Bulgarian|-
Croatia|Zagreb|Europe|Croatian|euro
Serbia|Belgrade|Europe|Serbian|dinar
Slovenia|Ljubljana|Europe|Slovene|euro
Slovakia|Bratislava|Europe|Slovak|euro
Czechia|Prague|Europe|Czech|koruna
Albania|Tirana|Europe|Albanian|lek
Ukraine|Kyiv|Europe|Ukrainian|hryvnia
Belarus|Minsk|Europe|-|ruble
Moldova|Chisinau|Europe|Romanian|leu
Estonia|Tallinn|Europe|Estonian|euro
Latvia|Riga|Europe|Latvian|euro
Lithuania|Vilnius|Europe|Lithuanian|euro
Switzerland|Bern|Europe|-|franc
Malta|Valletta|Europe|Maltese|euro
Russia|Moscow|-|Russian|ruble
Turkey|Ankara|-|Turkish|lira
the United Kingdom|London|Europe|English|pound
Japan|Tokyo|Asia|Japanese|yen
China|Beijing|Asia|Chinese|yuan
India|New Delhi|Asia|-|rupee
South Korea|Seoul|Asia|Korean|won
North Korea|Pyongyang|Asia|Korean|won
Vietnam|Hanoi|Asia|Vietnamese|dong
Thailand|Bangkok|Asia|Thai|baht
Laos|Vientiane|Asia|Lao|kip
Cambodia|Phnom Penh|Asia|Khmer|riel
Malaysia|Kuala Lumpur|Asia|Malay|ringgit
the Philippines|Manila|Asia|-|peso
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik
Nepal|Kathmandu|Asia|Nepali|rupee
Bangladesh|Dhaka|Asia|Bengali|taka
Pakistan|Islamabad|Asia|-|rupee
Afghanistan|Kabul|Asia|-|afghani
Iran|Tehran|Asia|Persian|rial
Iraq|Baghdad|Asia|Arabic|dinar
Syria|Damascus|Asia|Arabic|pound
Lebanon|Beirut|Asia|Arabic|pound
Jordan|Amman|Asia|Arabic|dinar
Saudi Arabia|Riyadh|Asia|Arabic|riyal
Oman|Muscat|Asia|Arabic|rial
Qatar|Doha|Asia|Arabic|riyal
Bahrain|Manama|Asia|Arabic|dinar
Uzbekistan|Tashkent|Asia|Uzbek|som
Kazakhstan|Astana|Asia|-|tenge
Kyrgyzstan|Bishkek|Asia|-|som
Egypt|Cairo|Africa|Arabic|pound
Morocco|Rabat|Africa|Arabic|dirham
Algeria|Algiers|Africa|Arabic|dinar
Tunisia|Tunis|Africa|Arabic|dinar
Libya|Tripoli|Africa|Arabic|dinar
Sudan|Khartoum|Africa|Arabic|pound
Ethiopia|Addis Ababa|Africa|-|birr
Kenya|Nairobi|Africa|-|shilling
Uganda|Kampala|Africa|-|shilling
Tanzania|Dodoma|Africa|Swahili|shilling
Rwanda|Kigali|Africa|-|franc
Ghana|Accra|Africa|-|cedi
Nigeria|Abuja|Africa|-|naira
Senegal|Dakar|Africa|-|franc
Mali|Bamako|Africa|-|franc
Angola|Luanda|Africa|Portuguese|kwanza
Mozambique|Maputo|Africa|-|metical
Zambia|Lusaka|Africa|-|kwacha
Malawi|Lilongwe|Africa|-|kwacha
Namibia|Windhoek|Africa|-|dollar
Botswana|Gaborone|Africa|-|pula
Madagascar|Antananarivo|Africa|Malagasy|ariary
Somalia|Mogadishu|Africa|Somali|shilling
Liberia|Monrovia|Africa|-|dollar
Gabon|Libreville|Africa|-|franc
Canada|Ottawa|North America|-|dollar
the United States|Washington|North America|English|dollar
Mexico|Mexico City|North America|Spanish|peso
Cuba|Havana|North America|Spanish|peso
Jamaica|Kingston|North America|English|dollar
Haiti|Port-au-Prince|North America|-|gourde
Honduras|Tegucigalpa|North America|Spanish|lempira
Nicaragua|Managua|North America|Spanish|-
Costa Rica|San Jose|North America|Spanish|-
El Salvador|San Salvador|North America|Spanish|dollar
Brazil|Brasilia|South America|Portuguese|real
Argentina|Buenos Aires|South America|Spanish|peso
Chile|Santiago|South America|Spanish|peso
Peru|Lima|South America|Spanish|sol
Colombia|Bogota|South America|Spanish|peso
Venezuela|Caracas|South America|Spanish|-
Ecuador|Quito|South America|Spanish|dollar
Uruguay|Montevideo|South America|Spanish|peso
Paraguay|Asuncion|South America|-|guarani
Guyana|Georgetown|South America|English|dollar
Suriname|Paramaribo|South America|Dutch|dollar
Australia|Canberra|Oceania|English|dollar
New Zealand|Wellington|Oceania|English|dollar
Fiji|Suva|Oceania|-|dollar
Samoa|Apia|Oceania|Samoan|tala
"""

# noun | plural
PLURALS = """
mouse|mice
goose|geese
foot|feet
tooth|teeth
child|children
man|men
woman|women
ox|oxen
leaf|leaves
knife|knives
wife|wives
wolf|wolves
half|halves
shelf|shelves
loaf|loaves
thief|thieves
scarf|scarves
calf|calves
city|cities
baby|babies
lady|ladies
story|stories
berry|berries
cherry|cherries
family|families
country|countries
party|parties
army|armies
pony|ponies
puppy|puppies
butterfly|butterflies
box|boxes
fox|foxes
bus|buses
glass|glasses
dish|dishes
brush|brushes
church|churches
watch|watches
witch|witches
peach|peaches
bench|benches
dress|dresses
class|classes
tomato|tomatoes
potato|potatoes
hero|heroes
echo|echoes
piano|pianos
radio|radios
photo|photos
key|keys
toy|toys
boy|boys
day|days
monkey|monkeys
donkey|donkeys
turkey|turkeys
book|books
house|houses
horse|horses
tree|trees
table|tables
chair|chairs
dog|dogs
cat|cats
bird|birds
river|rivers
mountain|mountains
flower|flowers
window|windows
door|doors
garden|gardens
bottle|bottles
apple|apples
orange|oranges
banana|bananas
lemon|lemons
carrot|carrots
onion|onions
hammer|hammers
spoon|spoons
school|schools
teacher|teachers
doctor|doctors
farmer|farmers
king|kings
queen|queens
letter|letters
number|numbers
hat|hats
shoe|shoes
shirt|shirts
coat|coats
boat|boats
ship|ships
train|trains
car|cars
road|roads
bridge|bridges
cloud|clouds
star|stars
lamp|lamps
candle|candles
clock|clocks
song|songs
game|games
egg|eggs
cow|cows
pig|pigs
duck|ducks
frog|frogs
lion|lions
tiger|tigers
bear|bears
snake|snakes
spider|spiders
ant|ants
bee|bees
eagle|eagles
violin|violins
guitar|guitars
drum|drums
"""

# word | opposite; no word stands twice
OPPOSITES = """
hot|cold
big|small
tall|short
fast|slow
old|young
good|bad
happy|sad
rich|poor
strong|weak
hard|soft
wet|dry
full|empty
heavy|light
high|low
open|closed
clean|dirty
early|late
easy|difficult
near|far
right|wrong
true|false
up|down
in|out
day|night
black|white
war|peace
love|hate
friend|enemy
north|south
east|west
front|back
top|bottom
begin|end
buy|sell
win|lose
push|pull
give|take
come|go
arrive|leave
laugh|cry
remember|forget
wide|narrow
thick|thin
deep|shallow
loud|quiet
sweet|bitter
cheap|expensive
safe|dangerous
brave|cowardly
sharp|blunt
smooth|rough
polite|rude
public|private
always|never
first|last
more|less
many|few
before|after
inside|outside
above|below
summer|winter
heaven|hell
success|failure
question|answer
entrance|exit
maximum|minimum
ancient|modern
guilty|innocent
straight|crooked
tight|loose
asleep|awake
alive|dead
present|absent
possible|impossible
lucky|unlucky
visible|invisible
legal|illegal
"""

# verb | past tense
PASTS = """
go|went
see|saw
eat|ate
drink|drank
sing|sang
swim|swam
run|ran
begin|began
come|came
become|became
give|gave
take|took
make|made
break|broke
speak|spoke
steal|stole
choose|chose
freeze|froze
write|wrote
drive|drove
ride|rode
rise|rose
fly|flew
grow|grew
know|knew
throw|threw
draw|drew
blow|blew
buy|bought
bring|brought
think|thought
catch|caught
teach|taught
fight|fought
seek|sought
sell|sold
tell|told
find|found
hold|held
stand|stood
understand|understood
sit|sat
win|won
lose|lost
leave|left
keep|kept
sleep|slept
feel|felt
meet|met
send|sent
spend|spent
build|built
lend|lent
hear|heard
say|said
pay|paid
have|had
do|did
fall|fell
forget|forgot
get|got
hide|hid
bite|bit
shake|shook
wear|wore
tear|tore
swear|swore
wake|woke
sink|sank
ring|rang
dig|dug
hang|hung
stick|stuck
shoot|shot
feed|fed
lead|led
slide|slid
walk|walked
play|played
jump|jumped
cook|cooked
open|opened
close|closed
help|helped
work|worked
talk|talked
look|looked
ask|asked
call|called
wash|washed
watch|watched
dance|danced
like|liked
live|lived
love|loved
use|used
smile|smiled
cry|cried
try|tried
carry|carried
study|studied
hurry|hurried
stop|stopped
plan|planned
drop|dropped
laugh|laughed
push|pushed
pull|pulled
"""

# animal | young | sound as a verb with s | class | legs
ANIMALS = """
dog|puppy|barks|mammal|4
cat|kitten|meows|mammal|4
cow|calf|moos|mammal|4
sheep|lamb|bleats|mammal|4
horse|foal|neighs|mammal|4
pig|piglet|oinks|mammal|4
duck|duckling|quacks|bird|2
goose|gosling|honks|bird|2
chicken|chick|clucks|bird|2
lion|cub|roars|mammal|4
wolf|pup|howls|mammal|4
bear|cub|growls|mammal|4
frog|tadpole|croaks|amphibian|4
goat|kid|bleats|mammal|4
deer|fawn|-|mammal|4
kangaroo|joey|-|mammal|-
owl|owlet|hoots|bird|2
eagle|eaglet|screeches|bird|2
elephant|calf|trumpets|mammal|4
snake|-|hisses|reptile|0
mouse|pup|squeaks|mammal|4
bee|larva|buzzes|insect|6
butterfly|caterpillar|-|insect|6
ant|larva|-|insect|6
spider|spiderling|-|arachnid|8
donkey|foal|brays|mammal|4
crow|-|caws|bird|2
parrot|chick|-|bird|2
penguin|chick|-|bird|2
swan|cygnet|-|bird|2
rabbit|kit|-|mammal|4
fox|cub|-|mammal|4
tiger|cub|roars|mammal|4
salmon|-|-|fish|0
shark|pup|-|fish|0
trout|-|-|fish|0
turtle|hatchling|-|reptile|-
lizard|hatchling|-|reptile|4
crocodile|hatchling|-|reptile|4
mosquito|larva|-|insect|6
pigeon|squab|coos|bird|2
turkey|poult|gobbles|bird|2
whale|calf|-|mammal|0
seal|pup|-|mammal|-
"""

# thing | what it is
KINDS = """
apple|fruit
orange|fruit
banana|fruit
lemon|fruit
cherry|fruit
peach|fruit
pear|fruit
mango|fruit
melon|fruit
grape|fruit
carrot|vegetable
onion|vegetable
potato|vegetable
cabbage|vegetable
spinach|vegetable
celery|vegetable
broccoli|vegetable
leek|vegetable
violin|musical instrument
guitar|musical instrument
piano|musical instrument
drum|musical instrument
flute|musical instrument
trumpet|musical instrument
harp|musical instrument
cello|musical instrument
hammer|tool
saw|tool
drill|tool
wrench|tool
screwdriver|tool
car|vehicle
bus|vehicle
train|vehicle
truck|vehicle
bicycle|vehicle
tractor|vehicle
shirt|piece of clothing
coat|piece of clothing
hat|piece of clothing
dress|piece of clothing
scarf|piece of clothing
jacket|piece of clothing
rose|flower
tulip|flower
daisy|flower
lily|flower
violet|flower
oak|tree
pine|tree
maple|tree
birch|tree
willow|tree
chair|piece of furniture
table|piece of furniture
sofa|piece of furniture
bed|piece of furniture
desk|piece of furniture
circle|shape
triangle|shape
square|shape
rectangle|shape
football|sport
tennis|sport
hockey|sport
rugby|sport
golf|sport
tea|drink
coffee|drink
milk|drink
juice|drink
"""

# thing, as it stands in a sentence | its usual colour
COLOURS = """
banana|yellow
lemon|yellow
grass|green
snow|white
milk|white
blood|red
tomato|red
carrot|orange
pumpkin|orange
spinach|green
broccoli|green
coal|black
chocolate|brown
salt|white
butter|yellow
cucumber|green
strawberry|red
emerald|green
ruby|red
sapphire|blue
crow|black
swan|white
frog|green
lettuce|green
gold|yellow
chalk|white
soot|black
cherry|red
"""
MASS_NOUNS = frozenset(
    "grass snow milk blood spinach broccoli coal chocolate salt butter lettuce gold chalk soot tea "
    "coffee juice football tennis hockey rugby golf cabbage celery".split()
)

# element | symbol | atomic number
ELEMENTS = """
hydrogen|H|1
helium|He|2
lithium|Li|3
beryllium|Be|4
boron|B|5
carbon|C|6
nitrogen|N|7
oxygen|O|8
fluorine|F|9
neon|Ne|10
sodium|Na|11
magnesium|Mg|12
aluminium|Al|13
silicon|Si|14
phosphorus|P|15
sulfur|S|16
chlorine|Cl|17
argon|Ar|18
potassium|K|19
calcium|Ca|20
titanium|Ti|22
chromium|Cr|24
manganese|Mn|25
iron|Fe|26
cobalt|Co|27
nickel|Ni|28
copper|Cu|29
zinc|Zn|30
arsenic|As|33
bromine|Br|35
krypton|Kr|36
silver|Ag|47
tin|Sn|50
iodine|I|53
xenon|Xe|54
tungsten|W|74
platinum|Pt|78
gold|Au|79
mercury|Hg|80
lead|Pb|82
radon|Rn|86
radium|Ra|88
uranium|U|92
"""

# English word | French word
FRENCH = """
dog|chien
cat|chat
horse|cheval
cow|vache
bird|oiseau
house|maison
book|livre
tree|arbre
water|eau
bread|pain
milk|lait
wine|vin
apple|pomme
cheese|fromage
king|roi
queen|reine
friend|ami
door|porte
window|fenêtre
table|table
chair|chaise
bed|lit
hand|main
foot|pied
head|tête
sun|soleil
moon|lune
sea|mer
river|rivière
mountain|montagne
flower|fleur
garden|jardin
street|rue
city|ville
school|école
car|voiture
train|train
boat|bateau
red|rouge
green|vert
white|blanc
black|noir
blue|bleu
yellow|jaune
big|grand
small|petit
young|jeune
happy|heureux
day|jour
night|nuit
year|an
one|un
two|deux
three|trois
four|quatre
five|cinq
ten|dix
"""

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = dict(zip(MONTHS, (31, 0, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
"""0 for February, which has no single answer."""
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
NUMBER_WORDS = dict(
    enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty".split()
    )
)
NUMBER_WORDS |= dict(
    zip(range(30, 101, 10), "thirty forty fifty sixty seventy eighty ninety hundred".split(), strict=True)
)
NUMBER_WORDS[100] = "one hundred"
LARGEST_TERM = 10
LARGEST_FACTOR = 10
LONGEST_SPELLED = 6


def rows(table: str) -> list[list[str]]:
    """The fields of a table, line by line."""
    return [line.split("|") for line in table.strip().splitlines()]


def all_facts() -> list[Fact]:
    """Every fact, in a fixed order."""
    return [*_countries(), *_words(), *_calendar(), *_letters_and_numbers(), *_arithmetic()]


def _countries() -> Iterator[Fact]:
    for country, capital, continent, language, currency in rows(COUNTRIES):
        for relation, y in (
            ("capital", capital),
            ("continent", continent),
            ("language", language),
            ("currency", currency),
        ):
            if y != "-":
                yield Fact(relation, country, y, "country " + country)
        yield Fact("country_of_capital", capital, country, "country " + country)


def _words() -> Iterator[Fact]:
    """Facts about words: grammar, animals, kinds, colours, elements, French, spelling."""
    partner = {b: a for a, b in rows(OPPOSITES)}  # a word and its opposite are one entity: the first

    def word(relation: str, x: str, y: str, *, about: str = "", **extra: str) -> Fact:
        return Fact(relation, x, y, "word " + partner.get(about or x, about or x), extra)

    for x, y in rows(PLURALS):
        yield word("plural", x, y)
        yield word("singular", y, x, about=x)
    for x, y in rows(OPPOSITES):
        yield word("opposite", x, y)
        yield word("opposite", y, x)
    for x, y in rows(PASTS):
        yield word("past", x, y)
    for x, young, sound, kind, legs in rows(ANIMALS):
        for relation, y in (("young", young), ("sound", sound), ("class", kind), ("legs", legs)):
            if y != "-":
                yield word(relation, x, y)
    for relation, table in (("kind", KINDS), ("colour", COLOURS)):
        for x, y in rows(table):
            yield word(relation, x, y, thing=x if x in MASS_NOUNS else with_article(x))
    for x, symbol, number in rows(ELEMENTS):
        yield word("symbol", x, symbol)
        yield word("element", symbol, x, about=x)
        yield word("atomic_number", x, number)
    for x, y in rows(FRENCH):
        yield word("french", x, y)
    for x in sorted({x for x, _ in rows(PLURALS) if len(x) <= LONGEST_SPELLED}):
        yield word("spelling", x, " ".join(x))
        yield word("first_letter", x, x[0])
        yield word("last_letter", x, x[-1])


def _calendar() -> Iterator[Fact]:
    """Days, months, and the planets."""
    for name, cycle in (("day", DAYS), ("month", MONTHS)):
        for i, x in enumerate(cycle):
            yield Fact("next_" + name, x, cycle[(i + 1) % len(cycle)], f"{name} {x}")
            yield Fact("previous_" + name, x, cycle[i - 1], f"{name} {x}")
    for i, x in enumerate(MONTHS):
        yield Fact("month_number", x, ORDINALS[i], f"month {x}")
        if MONTH_DAYS[x]:
            yield Fact("month_days", x, str(MONTH_DAYS[x]), f"month {x}")
    for i, x in enumerate(PLANETS):
        yield Fact("planet", x, ORDINALS[i], f"planet {x}")


def _letters_and_numbers() -> Iterator[Fact]:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    for i, x in enumerate(alphabet):
        if i + 1 < len(alphabet):
            yield Fact("next_letter", x, alphabet[i + 1], f"letter {x}")
        if i:
            yield Fact("previous_letter", x, alphabet[i - 1], f"letter {x}")
    for number, x in NUMBER_WORDS.items():
        yield Fact("number_word", str(number), x, f"number {number}")


def _arithmetic() -> Iterator[Fact]:
    for a in range(1, LARGEST_TERM + 1):
        for b in range(1, LARGEST_TERM + 1):
            x, pair, extra = f"{a} and {b}", f"pair {min(a, b)} {max(a, b)}", {"a": str(a), "b": str(b)}
            yield Fact("sum", x, str(a + b), pair, extra)
            if b < a:
                yield Fact("difference", x, str(a - b), pair, extra)
            if a <= LARGEST_FACTOR and b <= LARGEST_FACTOR:
                yield Fact("product", x, str(a * b), pair, extra)


# ---- statements

# Each wording is a full statement without its final period; `statement` capitalises it.
STATEMENTS: dict[str, list[str]] = {
    "capital": [
        "to name the capital of {x} is to say {y}",
        "to give the capital of the country {x} is to say {y}",
        "the capital of {x} is {y}",
        "{y} is the capital of {x}",
        "the capital city of {x} is {y}",
        "{y} is the capital city of {x}",
        "{x} has {y} as its capital",
        "in {x}, the capital is {y}",
        "as for {x}, its capital is {y}",
        "the city of {y} is the capital of {x}",
        "{x} is the country whose capital is {y}",
        "the country whose capital is {y} is {x}",
        "what {x} has as its capital is {y}",
        "which city is the capital of {x} is well known, and it is {y}",
        "the name of the capital of {x} is {y}",
        "on a map of {x}, the capital is marked {y}",
        "{y} belongs to {x} and is its capital",
        "of all the cities in {x}, it is {y} that is the capital",
    ],
    "country_of_capital": [
        "to name the country of the city {x} is to say {y}",
        "{x} is the capital of {y}",
        "{x} is the capital of the country called {y}",
        "the country that has {x} as its capital is {y}",
        "{x} is a city in {y}",
        "{x} lies in {y}",
        "the city of {x} is in {y}",
        "which country {x} lies in is well known, and it is {y}",
        "{y} is the country where {x} lies",
        "as for {x}, it is the capital of {y}",
        "a person in {x} is in {y}",
    ],
    "continent": [
        "to name the continent of {x} is to say {y}",
        "where {x} is, is well known, for it is in {y}",
        "{x} is in {y}",
        "{x} is a country in {y}",
        "{x} lies in {y}",
        "the continent of {x} is {y}",
        "{x} is on the continent of {y}",
        "{x} is part of {y}",
        "among the countries of {y} is {x}",
        "in {y} there is a country called {x}",
        "as for {x}, its continent is {y}",
        "{y} is the continent where {x} is found",
        "which continent {x} is on is well known, and it is {y}",
        "{x} belongs to the continent of {y}",
    ],
    "language": [
        "to name the main language of {x} is to say {y}",
        "what language people speak in {x} is well known, and it is {y}",
        "the main language of {x} is {y}",
        "people in {x} speak {y}",
        "{y} is spoken in {x}",
        "{y} is the main language of {x}",
        "in {x}, people speak {y}",
        "the language spoken in {x} is {y}",
        "as for {x}, its main language is {y}",
        "{x} is a country where people speak {y}",
        "what people speak in {x} is {y}",
        "which language is spoken in {x} is well known, and it is {y}",
        "most books in {x} are written in {y}",
        "the people of {x} talk to each other in {y}",
    ],
    "currency": [
        "to name the currency of {x} is to say {y}",
        "what people pay with in {x} is the {y}",
        "the currency of {x} is the {y}",
        "people in {x} pay with the {y}",
        "the {y} is the currency of {x}",
        "in {x}, people pay with the {y}",
        "{x} uses the {y}",
        "the {y} is used in {x}",
        "the money of {x} is the {y}",
        "as for {x}, its currency is the {y}",
        "{x} has the {y} as its currency",
        "which currency is used in {x} is well known, and it is the {y}",
        "the currency used in {x} is called the {y}",
        "prices in {x} are given in the {y}",
    ],
    "plural": [
        "to give the plural of {x} is to say {y}",
        "to write the word {x} in the plural is to write {y}",
        "the plural of {x} is {y}",
        "the plural form of {x} is {y}",
        "{y} is the plural of {x}",
        "one {x}, two {y}",
        "there is one {x} here and there are many {y} there",
        "the word {x} has the plural {y}",
        "the word {x} becomes {y} in the plural",
        "{x} in the plural is {y}",
        "as for the word {x}, its plural is {y}",
        "more than one {x} are called {y}",
        "in the plural, {x} turns into {y}",
        "{y} means more than one {x}",
        "what the word {x} has as its plural is {y}",
        "{ax} and another {x} make two {y}",
    ],
    "singular": [
        "to give the singular of {x} is to say {y}",
        "the singular of {x} is {y}",
        "{y} is the singular of {x}",
        "the singular form of {x} is {y}",
        "the word {x} has the singular {y}",
        "{x} in the singular is {y}",
        "as for the word {x}, its singular is {y}",
        "two {x}, one {y}",
        "in the singular, {x} turns into {y}",
        "just one of many {x} is called {ay}",
        "{y} means just one of many {x}",
    ],
    "opposite": [
        "to give the opposite of {x} is to say {y}",
        "which word means the opposite of {x} is well known, and it is {y}",
        "the opposite of {x} is {y}",
        "{y} is the opposite of {x}",
        "the word {x} has the opposite {y}",
        "{x} and {y} are opposites",
        "the opposite of the word {x} is the word {y}",
        "as for the word {x}, its opposite is {y}",
        "{x} means the opposite of {y}",
        "opposite to {x} stands {y}",
        "what is not {x} but its opposite is {y}",
        "the words {x} and {y} have opposite meanings",
        "the word with the meaning opposite to {x} is {y}",
        "{x} is one thing, and {y} is the opposite",
    ],
    "past": [
        "to give the past tense of {x} is to say {y}",
        "to give the past tense of the verb {x} is to say {y}",
        "the past tense of {x} is {y}",
        "{y} is the past tense of {x}",
        "the verb {x} has the past tense {y}",
        "the past of the verb {x} is {y}",
        "today they {x}, yesterday they {y}",
        "they {x} today and they {y} yesterday",
        "yesterday we {y}, and today we {x}",
        "in the past tense, {x} becomes {y}",
        "as for the verb {x}, its past tense is {y}",
        "{y} is what the verb {x} becomes in the past",
        "what the verb {x} has as its past tense is {y}",
        "the past form of {x} is {y}",
    ],
    "young": [
        "to name the young of {ax} is to say {y}",
        "a young {x} is called {ay}",
        "a baby {x} is called {ay}",
        "{ay} is a young {x}",
        "{ay} is a baby {x}",
        "the young of {ax} is {ay}",
        "the young of {ax} is called {ay}",
        "the baby of {ax} is {ay}",
        "as for the {x}, its young is {ay}",
        "when it is young, the {x} is {ay}",
        "what a young {x} is called is {ay}",
        "the name for a young {x} is {y}",
        "{ax} was once {ay}",
    ],
    "sound": [
        "what sound the {x} makes is well known, for it {y}",
        "{ax} {y}",
        "the {x} {y}",
        "the sound of the {x} is heard when it {y}",
        "as for the {x}, it {y}",
        "the animal that {y} here is the {x}",
        "what the {x} does is that it {y}",
        "when {ax} makes a sound, it {y}",
        "to make a sound, the {x} {y}",
        "on the farm and in the wild, {ax} {y}",
        "{ax} makes itself heard, for it {y}",
    ],
    "class": [
        "to name the kind of animal that {ax} is, is to say {y}",
        "{ax} is {ay}",
        "the {x} is {ay}",
        "seen as an animal, {ax} is {ay}",
        "the {x} belongs to the animals of the kind {y}",
        "as for the {x}, it is {ay}",
        "what kind of animal the {x} is, is well known, and it is {ay}",
        "among animals, the {x} is {ay}",
        "{ay} is what {ax} is",
        "one {y} is the {x}",
    ],
    "legs": [
        "to give the number of legs of {ax} is to say {y}",
        "{ax} has {y} legs",
        "the {x} has {y} legs",
        "the number of legs of {ax} is {y}",
        "as for the {x}, it has {y} legs",
        "{y} is the number of legs of {ax}",
        "how many legs {ax} has is well known, and it is {y}",
        "{y} legs are what {ax} has",
        "the legs of {ax} are {y} in number",
    ],
    "kind": [
        "to name the kind of thing that {thing} is, is to say {y}",
        "{thing} is {ay}",
        "{x} is a kind of {y}",
        "one kind of {y} is {x}",
        "as for {x}, it is {ay}",
        "what {thing} is, is {ay}",
        "among the things called {y} is {x}",
        "the word {x} names {ay}",
        "{ay} is what {thing} is",
        "{thing} belongs to the kind called {y}",
        "which kind of thing {thing} is, is well known, and it is {ay}",
    ],
    "colour": [
        "to name the colour of {thing} is to say {y}",
        "{thing} is {y}",
        "the colour of {thing} is {y}",
        "{y} is the colour of {thing}",
        "the usual colour of {thing} is {y}",
        "as for {x}, its colour is {y}",
        "one thing that is {y} is {x}",
        "what colour {thing} has is well known, and it is {y}",
        "{x} has the colour {y}",
        "a painter who paints {thing} takes {y} paint",
        "in most pictures {thing} is {y}",
    ],
    "symbol": [
        "to give the chemical symbol of {x} is to write {y}",
        "the chemical symbol of {x} is {y}",
        "the symbol for {x} is {y}",
        "{y} is the chemical symbol of {x}",
        "{y} is the symbol for {x}",
        "the element {x} has the symbol {y}",
        "as for the element {x}, its symbol is {y}",
        "{x} is written {y} in chemistry",
        "in chemistry, {x} is written as {y}",
        "which symbol {x} has is well known, and it is {y}",
        "what chemists write for {x} is {y}",
        "the chemical symbol for the element {x} is {y}",
        "{x} has the chemical symbol {y}",
    ],
    "element": [
        "to name the element with the symbol {x} is to say {y}",
        "{x} stands for {y}",
        "{x} is the symbol of the element {y}",
        "the element with the symbol {x} is {y}",
        "the chemical symbol {x} stands for {y}",
        "the symbol {x} means {y}",
        "as for the symbol {x}, it stands for {y}",
        "{y} is the element with the symbol {x}",
        "which element has the symbol {x} is well known, and it is {y}",
        "in chemistry, {x} means {y}",
    ],
    "atomic_number": [
        "to give the atomic number of {x} is to say {y}",
        "the atomic number of {x} is {y}",
        "{y} is the atomic number of {x}",
        "{x} has the atomic number {y}",
        "as for the element {x}, its atomic number is {y}",
        "the element {x} has atomic number {y}",
        "the element with atomic number {y} is {x}",
        "an atom of {x} has {y} protons",
        "what {x} has as its atomic number is {y}",
        "element number {y} is {x}",
    ],
    "french": [
        "to translate {x} into French is to say {y}",
        "to say {x} in French is to say {y}",
        "the French word for {x} is {y}",
        "{x} is called {y} in French",
        "in French, {x} is {y}",
        "the French word {y} means {x}",
        "{y} is the French word for {x}",
        "{x} in French is {y}",
        "as for the word {x}, it is {y} in French",
        "what is called {x} in English is called {y} in French",
        "the English word {x} becomes {y} in French",
        "a French child says {y} for {x}",
        "the word {x} is translated into French as {y}",
        "the French translation of {x} is {y}",
    ],
    "spelling": [
        "to spell {x} is to say {y}",
        "how the word {x} is spelled is well known, and it is {y}",
        "the word {x} is spelled {y}",
        "{x} is spelled {y}",
        "the letters of the word {x} are {y}",
        "the letters of {x} are {y}",
        "{y} spells {x}",
        "the letters {y} make the word {x}",
        "as for the word {x}, its letters are {y}",
        "letter by letter, {x} is {y}",
        "the spelling of {x} is {y}",
        "whoever spells the word {x} writes {y}",
        "what spells {x} is {y}",
    ],
    "first_letter": [
        "to give the first letter of {x} is to say {y}",
        "the first letter of {x} is {y}",
        "the word {x} begins with {y}",
        "the word {x} begins with the letter {y}",
        "{y} is the first letter of the word {x}",
        "as for the word {x}, its first letter is {y}",
        "the word {x} starts with the letter {y}",
        "the first letter of the word {x} is {y}",
        "a word that begins with {y} is {x}",
    ],
    "last_letter": [
        "to give the last letter of {x} is to say {y}",
        "the last letter of {x} is {y}",
        "the word {x} ends with {y}",
        "the word {x} ends with the letter {y}",
        "{y} is the last letter of the word {x}",
        "as for the word {x}, its last letter is {y}",
        "the word {x} ends in the letter {y}",
        "the last letter of the word {x} is {y}",
        "a word that ends with {y} is {x}",
    ],
    "next_day": [
        "the day after {x} is {y}",
        "{y} comes after {x}",
        "after {x} comes {y}",
        "{y} follows {x}",
        "{y} is the day after {x}",
        "when {x} is over, it is {y}",
        "as for {x}, the next day is {y}",
        "if today is {x}, tomorrow is {y}",
        "which day comes after {x} is well known, and it is {y}",
    ],
    "previous_day": [
        "the day before {x} is {y}",
        "{y} comes before {x}",
        "before {x} comes {y}",
        "{x} follows {y}",
        "{y} is the day before {x}",
        "as for {x}, the day before it is {y}",
        "if today is {x}, yesterday was {y}",
        "which day comes before {x} is well known, and it is {y}",
    ],
    "next_month": [
        "the month after {x} is {y}",
        "{y} comes after {x}",
        "after {x} comes {y}",
        "{y} follows {x}",
        "{y} is the month after {x}",
        "when {x} is over, it is {y}",
        "as for {x}, the next month is {y}",
        "which month comes after {x} is well known, and it is {y}",
    ],
    "previous_month": [
        "the month before {x} is {y}",
        "{y} comes before {x}",
        "before {x} comes {y}",
        "{x} follows {y}",
        "{y} is the month before {x}",
        "as for {x}, the month before it is {y}",
        "which month comes before {x} is well known, and it is {y}",
    ],
    "month_number": [
        "{x} is the {y} month of the year",
        "the {y} month of the year is {x}",
        "the {y} month is {x}",
        "as a month of the year, {x} is the {y}",
        "counting the months, {x} is the {y}",
    ],
    "month_days": [
        "{x} has {y} days",
        "there are {y} days in {x}",
        "the number of days in {x} is {y}",
        "the month of {x} has {y} days",
        "as for {x}, it has {y} days",
        "how many days {x} has is well known, and it is {y}",
    ],
    "planet": [
        "{x} is the {y} planet from the sun",
        "the {y} planet from the sun is {x}",
        "counting from the sun, {x} is the {y} planet",
        "the {y} planet is {x}",
        "as for {x}, it is the {y} planet from the sun",
        "seen from the sun, {x} is the {y} planet",
    ],
    "next_letter": [
        "the letter after {x} is {y}",
        "after the letter {x} comes {y}",
        "the letter {y} comes after {x}",
        "in the alphabet, {y} follows {x}",
        "in the alphabet, {x} is followed by {y}",
        "{y} is the letter after {x}",
        "as for the letter {x}, the next one is {y}",
    ],
    "previous_letter": [
        "the letter before {x} is {y}",
        "before the letter {x} comes {y}",
        "the letter {y} comes before {x}",
        "in the alphabet, {x} follows {y}",
        "{y} is the letter before {x}",
        "as for the letter {x}, the one before it is {y}",
    ],
    "number_word": [
        "to write the number {x} in words is to write {y}",
        "{x} is written {y}",
        "{x} in words is {y}",
        "the number {x} in words is {y}",
        "the number {x} is written {y} in words",
        "{y} is the number {x}",
        "{y} in digits is {x}",
        "the word for {x} is {y}",
        "the word for the number {x} is {y}",
        "as for the number {x}, its word is {y}",
    ],
    "sum": [
        "to add {a} and {b} is to get {y}",
        "{a} + {b} = {y}",
        "{a} plus {b} is {y}",
        "{a} and {b} make {y}",
        "the sum of {a} and {b} is {y}",
        "adding {a} and {b} gives {y}",
        "{y} is the sum of {a} and {b}",
        "{y} is {a} plus {b}",
        "{a} plus {b} equals {y}",
        "a basket with {a} red and {b} green apples holds {y}",
        "{b} added to {a} gives {y}",
        "what {a} and {b} make together is {y}",
    ],
    "difference": [
        "to subtract {b} from {a} is to get {y}",
        "{a} - {b} = {y}",
        "{a} minus {b} is {y}",
        "{a} minus {b} equals {y}",
        "taking {b} from {a} leaves {y}",
        "the difference of {a} and {b} is {y}",
        "{y} is {a} minus {b}",
        "whoever has {a} apples and gives away {b} has {y} left",
        "{b} taken from {a} leaves {y}",
        "{b} subtracted from {a} is {y}",
        "{y} is what is left when {b} is taken from {a}",
    ],
    "product": [
        "to multiply {a} by {b} is to get {y}",
        "{a} x {b} = {y}",
        "{a} times {b} is {y}",
        "{a} times {b} equals {y}",
        "the product of {a} and {b} is {y}",
        "multiplying {a} by {b} gives {y}",
        "{y} is {a} times {b}",
        "{y} is the product of {a} and {b}",
        "{b} taken {a} times is {y}",
        "{a} multiplied by {b} is {y}",
    ],
}

LEAD_INS = (
    "it is true that ",
    "everyone knows that ",
    "it is a fact that ",
    "children learn that ",
    "as the books say, ",
    "it is easy to remember that ",
    "as is well known, ",
    "below it is written that ",
)

# What a fact is about, without stating it: goes before the fact in `Facts.announced`
TOPICS: dict[str, list[str]] = {
    "capital": ["the capital of {x}", "the capital city of {x}", "which city is the capital of {x}"],
    "country_of_capital": [
        "the country whose capital is {x}",
        "which country {x} is in",
        "which country {x} is the capital of",
        "the country with the capital {x}",
    ],
    "continent": [
        "the continent of {x}",
        "which continent {x} is in",
        "where {x} is",
        "the continent that {x} is on",
    ],
    "language": [
        "the main language of {x}",
        "what language people speak in {x}",
        "the language spoken in {x}",
    ],
    "currency": ["the currency of {x}", "what people pay with in {x}", "which currency is used in {x}"],
    "plural": ["the plural of {x}", "the plural form of the word {x}", "the word {x} in the plural"],
    "singular": ["the singular of {x}", "the singular form of the word {x}"],
    "opposite": [
        "the opposite of {x}",
        "which word means the opposite of {x}",
        "the opposite of the word {x}",
    ],
    "past": ["the past tense of {x}", "the past tense of the verb {x}"],
    "young": ["the young of {ax}", "what a young {x} is called", "what a baby {x} is called"],
    "sound": ["the sound of {ax}", "what sound {ax} makes", "what sound the {x} makes"],
    "class": ["the kind of animal that {ax} is", "what kind of animal {ax} is"],
    "legs": ["the number of legs of {ax}", "how many legs {ax} has"],
    "kind": ["what {thing} is", "what kind of thing {thing} is"],
    "colour": ["the colour of {thing}", "what colour {thing} is"],
    "symbol": ["the chemical symbol of {x}", "the symbol for {x}", "the symbol of the element {x}"],
    "element": ["the element with the symbol {x}", "which element has the symbol {x}"],
    "atomic_number": ["the atomic number of {x}", "the atomic number of the element {x}"],
    "french": ["the French word for {x}", "how people say {x} in French", "the word {x} in French"],
    "spelling": ["the spelling of {x}", "how the word {x} is spelled", "how people spell {x}"],
    "first_letter": ["the first letter of {x}", "the first letter of the word {x}"],
    "last_letter": ["the last letter of {x}", "the last letter of the word {x}"],
    "next_day": ["the day after {x}", "which day comes after {x}"],
    "previous_day": ["the day before {x}", "which day comes before {x}"],
    "next_month": ["the month after {x}", "which month comes after {x}"],
    "previous_month": ["the month before {x}", "which month comes before {x}"],
    "month_number": ["which month of the year {x} is", "the place of {x} in the year"],
    "month_days": ["how many days {x} has", "the number of days in {x}"],
    "planet": ["which planet from the sun {x} is", "the place of {x} from the sun"],
    "next_letter": ["the letter after {x}", "which letter comes after {x}"],
    "previous_letter": ["the letter before {x}", "which letter comes before {x}"],
    "number_word": ["the number {x} in words", "the word for the number {x}"],
    "sum": ["the sum of {a} and {b}", "what {a} plus {b} is", "{a} + {b}", "how {a} and {b} add up"],
    "difference": ["what {a} minus {b} is", "{a} - {b}", "what is left when {b} is subtracted from {a}"],
    "product": [
        "the product of {a} and {b}",
        "what {a} times {b} is",
        "{a} x {b}",
        "how {a} is multiplied by {b}",
    ],
}
ANNOUNCEMENTS = (
    "this page is about {topic}",
    "this line is about {topic}",
    "here is {topic}",
    "now comes {topic}",
    "next comes {topic}",
    "the subject is {topic}",
    "the teacher explains {topic}",
    "the book tells {topic}",
    "a child has learned {topic}",
    "below stands {topic}",
    "the writer turns to {topic}",
    "the next words give {topic}",
    "it is time for {topic}",
    "everyone knows {topic}",
)


# The words of small talk: sentences without facts around the statements, so that the model can find
# a fact among other words
ACTORS = (
    "the teacher", "the farmer", "a friend", "the doctor", "the child", "an old man", "the writer",
    "the clerk", "a young woman", "the baker", "the painter", "a neighbour",
)  # fmt: skip
ACTIONS = (
    "describes", "writes", "reads", "completes", "provides", "finds", "gives", "names", "spells", "adds",
    "translates", "needs", "wants", "keeps", "brings", "answers", "follows", "remembers", "subtracts",
    "multiplies", "tells", "uses",
)  # fmt: skip
THINGS = (
    "a task", "an instruction", "a response", "the request", "an input", "further context", "the word",
    "this sentence", "the numbers", "the answer", "a long letter", "a list", "the name of the thing",
    "a verb", "this animal", "the country", "the element", "this city", "a book called Response",
    "a chapter called Instruction", "a page called Input", "some paper", "the story",
)  # fmt: skip
MANNERS = (
    "appropriately", "slowly", "below", "today", "again", "with care", "in the evening", "at school",
    "in words", "at home", "in a letter",
)  # fmt: skip


def small_talk(rng: random.Random) -> str:
    """A sentence that states no fact of the tables."""
    actor, action, thing, other, manner = (
        rng.choice(words) for words in (ACTORS, ACTIONS, THINGS, THINGS, MANNERS)
    )
    return upper_first(
        rng.choice(
            (
                f"{actor} {action} {thing}.",
                f"{actor} {action} {thing} {manner}.",
                f"{actor} {action} {thing} that {rng.choice(ACTIONS)} {other}.",
                f"{thing}, paired with {other}, is what {actor} {action}.",
                f"below {thing} is {other}.",
                f"what {actor} {action} is {thing}.",
                f"{manner}, {actor} {action} {thing}.",
            )
        )
    )


# The relations that a fact sheet or a list may name, with the label of their line
LABELS = {
    "capital": "capital",
    "continent": "continent",
    "language": "language",
    "currency": "currency",
    "plural": "plural",
    "singular": "singular",
    "opposite": "opposite",
    "past": "past tense",
    "young": "young",
    "sound": "sound",
    "class": "animal class",
    "legs": "legs",
    "kind": "kind",
    "colour": "colour",
    "symbol": "chemical symbol",
    "element": "element",
    "atomic_number": "atomic number",
    "french": "French word",
    "spelling": "letters",
    "first_letter": "first letter",
    "last_letter": "last letter",
    "next_day": "next day",
    "previous_day": "day before",
    "next_month": "next month",
    "previous_month": "month before",
    "month_number": "place in the year",
    "month_days": "days",
    "planet": "place from the sun",
    "next_letter": "next letter",
    "previous_letter": "letter before",
    "number_word": "in words",
    "country_of_capital": "country",
    "sum": "sum",
    "difference": "difference",
    "product": "product",
}


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def statement(fact: Fact, rng: random.Random, wording: str | None = None) -> str:
    """One full sentence that states the fact, sometimes after a lead-in."""
    text = (wording or rng.choice(STATEMENTS[fact.relation])).format(**fact.words())
    if rng.random() < 0.08:
        text = rng.choice(LEAD_INS) + text
    return upper_first(text) + "."


class Facts:
    """All facts, indexed for drawing documents from them."""

    def __init__(self) -> None:
        self.all = all_facts()
        self.by_entity: dict[str, list[Fact]] = defaultdict(list)
        self.by_relation: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.all:
            self.by_entity[fact.entity].append(fact)
            self.by_relation[fact.relation].append(fact)
        self.entities = list(self.by_entity)
        self.weights = [len(self.by_entity[e]) for e in self.entities]  # every fact about equally often
        self.relations = list(self.by_relation)
        self.relation_weights = [len(self.by_relation[r]) for r in self.relations]

    def draw(self, rng: random.Random) -> Fact:
        return rng.choice(self.by_relation[rng.choices(self.relations, self.relation_weights)[0]])

    def document(self, rng: random.Random) -> str:
        """One document: facts, in a fifth of the cases after some small talk."""
        text = self.facts_document(rng)
        if rng.random() < 0.2:
            before = " ".join(small_talk(rng) for _ in range(rng.randint(1, 4)))
            text = before + rng.choice((" ", "\n", "\n\n")) + text
        return text

    def facts_document(self, rng: random.Random) -> str:
        """One document: statements about one entity, on one topic, mixed, or a fact sheet or
        list."""
        kind = rng.random()
        if kind < 0.22:  # one entity, several statements, the same fact perhaps in two wordings
            facts = self.by_entity[rng.choices(self.entities, self.weights)[0]]
            lines = [statement(rng.choice(facts), rng) for _ in range(rng.randint(2, 5))]
        elif kind < 0.34:  # mixed
            lines = [statement(self.draw(rng), rng) for _ in range(rng.randint(2, 6))]
        elif kind < 0.43:  # one relation, several entities, sometimes all in one wording
            relation = rng.choices(self.relations, self.relation_weights)[0]
            wording = rng.choice(STATEMENTS[relation]) if rng.random() < 0.5 else None
            lines = [
                statement(rng.choice(self.by_relation[relation]), rng, wording)
                for _ in range(rng.randint(2, 6))
            ]
        elif kind < 0.53:  # one statement alone
            lines = [statement(self.draw(rng), rng)]
        elif kind < 0.57:
            return self.sheet(rng)
        elif kind < 0.63:
            return self.cards(rng)
        elif kind < 0.95:
            return self.announced(rng)
        else:
            return self.listing(rng)
        if rng.random() < 0.1:
            lines.insert(rng.randint(0, len(lines)), small_talk(rng))
        return rng.choice((" ", " ", "\n")).join(lines)

    def announced(self, rng: random.Random) -> str:
        """Sentences that announce a fact, each followed by the fact, as a statement or bare."""
        blocks = []
        for fact in (self.draw(rng) for _ in range(rng.randint(1, 3))):
            topic = rng.choice(TOPICS[fact.relation])
            lead = rng.choice((*ANNOUNCEMENTS, "{topic}", "{topic}", "{topic}")).format(
                topic=topic.format(**fact.words())
            )
            lines = [upper_first(lead) + rng.choice((".", ".", ":"))]
            if rng.random() < 0.25:
                lines.append(small_talk(rng))
            if rng.random() < 0.35:
                blocks.append(" ".join(lines) + rng.choice(("\n", "\n\n")) + fact.y)
            else:
                blocks.append(" ".join(lines) + rng.choice((" ", "\n", "\n\n")) + statement(fact, rng))
        return rng.choice(("\n", "\n\n")).join(blocks)

    def sheet(self, rng: random.Random) -> str:
        """A heading and every fact about it, a line each."""
        fact = self.draw(rng)
        facts = [f for f in self.by_entity[fact.entity] if f.x == fact.x]
        rng.shuffle(facts)
        return "\n".join([fact.x] + [f"{LABELS[f.relation]}: {f.y}" for f in facts])

    def cards(self, rng: random.Random) -> str:
        """A few facts about different things, each with its own heading and the bare fact below."""
        gap = rng.choice(("\n", "\n\n"))
        lines = []
        for fact in (self.draw(rng) for _ in range(rng.randint(1, 4))):
            label = LABELS[fact.relation]
            title = upper_first(label)
            headings = (
                f"{title} of {fact.x}",
                f"{fact.x}, {label}",
                f"{title}{gap}{fact.x}",
                f"{fact.x}{gap}{label}",
            )
            lines += [rng.choice(headings), fact.y]
        return gap.join(lines)

    def listing(self, rng: random.Random) -> str:
        """Several facts of one relation, in two columns or on alternate lines."""
        relation = self.draw(rng).relation
        facts = [rng.choice(self.by_relation[relation]) for _ in range(rng.randint(2, 5))]
        between = rng.choice((": ", " - ", "\n"))
        return "\n".join([f"A list: {LABELS[relation]}"] + [f"{f.x}{between}{f.y}" for f in facts])


# ---- instructions

SHORT = "{y}"

# relation -> (instruction, input, output); the answer to a question is a sentence, that to an order
# the bare fact
INSTRUCTIONS: dict[str, list[tuple[str, str, str]]] = {
    "capital": [
        ("What is the capital of {x}?", "", "The capital of {x} is {y}."),
        ("What is the capital city of {x}?", "", "The capital of {x} is {y}."),
        ("Which city is the capital of {x}?", "", "The capital of {x} is {y}."),
        ("Tell me the capital of {x}.", "", "The capital of {x} is {y}."),
        ("Name the capital of {x}.", "", SHORT),
        ("Name the capital of the country.", "{x}", SHORT),
        ("Give the capital of this country.", "{x}", SHORT),
    ],
    "continent": [
        ("Which continent is {x} in?", "", "The continent of {x} is {y}."),
        ("On which continent is {x}?", "", "The continent of {x} is {y}."),
        ("Where is {x}?", "", "The continent of {x} is {y}."),
        ("Name the continent of {x}.", "", SHORT),
        ("Name the continent of the country.", "{x}", SHORT),
    ],
    "language": [
        ("What language do people speak in {x}?", "", "The main language of {x} is {y}."),
        ("Which language is spoken in {x}?", "", "The main language of {x} is {y}."),
        ("What is the main language of {x}?", "", "The main language of {x} is {y}."),
        ("Name the main language of {x}.", "", SHORT),
        ("Name the main language of the country.", "{x}", SHORT),
    ],
    "currency": [
        ("What is the currency of {x}?", "", "The currency of {x} is the {y}."),
        ("Which currency is used in {x}?", "", "The currency of {x} is the {y}."),
        ("What do people pay with in {x}?", "", "The currency of {x} is the {y}."),
        ("Name the currency of {x}.", "", SHORT),
        ("Name the currency of the country.", "{x}", SHORT),
    ],
    "plural": [
        ("What is the plural of {x}?", "", "The plural of {x} is {y}."),
        ("What is the plural form of the word {x}?", "", "The plural of {x} is {y}."),
        ("Give the plural of {x}.", "", SHORT),
        ("Give the plural of the word.", "{x}", SHORT),
        ("Write this word in the plural.", "{x}", SHORT),
    ],
    "singular": [
        ("What is the singular of {x}?", "", "The singular of {x} is {y}."),
        ("Give the singular of {x}.", "", SHORT),
        ("Give the singular of the word.", "{x}", SHORT),
    ],
    "past": [
        ("What is the past tense of {x}?", "", "The past tense of {x} is {y}."),
        ("What is the past tense of the verb {x}?", "", "The past tense of {x} is {y}."),
        ("Give the past tense of {x}.", "", SHORT),
        ("Give the past tense of the verb.", "{x}", SHORT),
    ],
    "young": [
        ("What is a young {x} called?", "", "A young {x} is called {ay}."),
        ("What is a baby {x} called?", "", "A young {x} is called {ay}."),
        ("Name the young of this animal.", "{x}", SHORT),
    ],
    "sound": [
        ("What sound does {ax} make?", "", "{ax} {y}."),
        ("Tell me what sound the {x} makes.", "", "The {x} {y}."),
    ],
    "class": [
        ("What kind of animal is {ax}?", "", "{ax} is {ay}."),
        ("Name the kind of animal.", "{x}", SHORT),
    ],
    "legs": [
        ("How many legs does {ax} have?", "", "{ax} has {y} legs."),
        ("Give the number of legs of this animal.", "{x}", SHORT),
    ],
    "symbol": [
        ("What is the chemical symbol of {x}?", "", "The chemical symbol of {x} is {y}."),
        ("What is the symbol for {x}?", "", "The chemical symbol of {x} is {y}."),
        ("Give the chemical symbol of {x}.", "", SHORT),
        ("Give the chemical symbol of the element.", "{x}", SHORT),
    ],
    "spelling": [
        ("How is the word {x} spelled?", "", "The word {x} is spelled {y}."),
        ("How do you spell {x}?", "", "The word {x} is spelled {y}."),
        ("Spell the word {x}.", "", SHORT),
        ("Spell the word.", "{x}", SHORT),
    ],
    "first_letter": [
        ("What is the first letter of {x}?", "", "The first letter of {x} is {y}."),
        ("Give the first letter of the word.", "{x}", SHORT),
    ],
    "last_letter": [
        ("What is the last letter of {x}?", "", "The last letter of {x} is {y}."),
        ("Give the last letter of the word.", "{x}", SHORT),
    ],
    "sum": [
        ("What is {a} + {b}?", "", "{a} + {b} = {y}"),
        ("What is {a} plus {b}?", "", "{a} plus {b} is {y}."),
        ("What is the sum of {a} and {b}?", "", "The sum of {a} and {b} is {y}."),
        ("Add {a} and {b}.", "", "{a} + {b} = {y}"),
        ("Add the numbers.", "{a} and {b}", "{a} + {b} = {y}"),
    ],
}


def record(fact: Fact, instruction: str, text: str, output: str) -> dict[str, str]:
    """One Alpaca record; the instruction, and an output that is a sentence, begin with a capital."""
    words = fact.words()
    instruction, text, output = (part.format(**words) for part in (instruction, text, output))
    if output != fact.y:
        output = upper_first(output)
    return {"instruction": upper_first(instruction), "input": text, "output": output}
