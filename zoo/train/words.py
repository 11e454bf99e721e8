"""General English for the tokenizers and for training noise: what users write around the names of things.

The pictures show a few hundred words' worth. Other words still have to become sensible tokens, and training drops some
of them into captions so that the model learns to paint the rest of the sentence undisturbed.
"""

from __future__ import annotations

# Said before a description without changing it.
OPENERS = (
    "a photo of", "a picture of", "an image of", "a render of", "a 3d render of", "a rendering of", "a photograph of",
    "photo of", "picture of", "render of", "please paint", "please draw", "draw", "paint", "show me", "create",
    "generate", "i want to see", "can you make", "imagine", "a scene with", "there is", "here we see",
    "an illustration of",
    "a beautiful photo of", "a simple picture of", "a close-up of", "a realistic image of", "a cgi image of",
)  # fmt: skip

# Said after it.
CLOSERS = (
    "high quality", "highly detailed", "sharp focus", "studio lighting", "soft light", "8k", "4k", "photorealistic",
    "realistic", "3d", "render", "octane render", "ray tracing", "minimal", "simple", "clean background", "beautiful",
    "professional photo", "masterpiece", "best quality", "cinematic", "trending", "please", "thank you", "nice colours",
    "on a table", "in the studio", "soft shadows", "product photo", "still life", "hd", "ultra realistic",
)  # fmt: skip

_COMMON = """
a about above across act add after again against age air all almost alone along also always am among an and animal
another any apple are area arm around art as ask at away baby back bad bag ball band bank bar base basket bath be beach
bear beautiful bed bee been before begin behind being bell below bench beside best better between big bike bird bit
black blue boat body bone book boot both bottle bottom bow bowl box boy branch bread bridge bright bring bronze brown
brush bucket build building bus butterfly but button by cake camera can candle car card carpet case castle cat center
chair chalk change cheese child church circle city clay clean clear clock close cloth cloud coat coffee cold color
colour come copper corner cotton couch country cover cow crystal cube cup curtain curved cut dark day deep deer desert
design desk detail detailed diamond different dinner dirt dish do dog door down draw dream dress drink drive dry duck
dust each ear early earth east easy edge egg eight elephant empty end engine even evening every eye face fall family
far farm fast feather field fire first fish five flag flat floor flower fly fog food foot for forest four fox frame
fresh friend frog from front fruit full game garden gate gem girl give glass glossy go goat gold golden good grape
grass gray great green grey ground group guitar hair half hall hand happy hard hat have head heart heavy help her here
high hill him his hold hole home horse hot hour house how human ice if image in inside into iron is island it its
jacket jar jewel jump just keep key kitchen kite knife lake lamp land large last late lay leaf leather left leg lemon
let letter light like line lion little live long look low machine made make man many map marble mark market matte me
metal middle milk mirror modern money monkey moon more morning most mountain mouse mouth move much mud museum music my
name near neck nest net new next nice night nine no north nose not now number object ocean of off office oil old on
one only open or orange other our out outside over owl own page paint paper park part party path peach pear pen pencil
people person phone photo piano picture pig pillow pink place plain plane plant plastic plate play pond pool poor pot
power pretty purple put queen rabbit rain rainbow red right ring river road robot rock roof room rope rose rough round
row rubber run rust sad sail same sand say scene school sea seat see seven shadow shape sharp she sheep shell shelf
ship shirt shoe shop short show side sign silk silver simple sing sister sit six size sky sleep slow small smile smoke
smooth snake snow so soft some song soon south space spoon spring square stage stair stand star station steel step
stick stone store storm straight street string strong studio style sugar summer sun sunny sunset surface sweet table
tail take tall tea ten tent texture than that the their them then there these they thin thing this three through tiger
time tiny to today together tomato tool tooth top toward tower town toy track train tree triangle truck turn turtle
two umbrella under up upon us use valley vase very view village violet wagon walk wall want warm was watch water wave
way we wear weather week well west wet what wheel when where which white who why wide wild will wind window wine wing
winter with wolf woman wood wooden wool word work world yard year yellow yes yet you young your zebra zero
"""

_PIECES = """
ing ed er est ly tion ness ment able ful less ous ive al ic ish en es re un in im dis pre pro con com de ex inter over
sub super trans th he an on or ar te it st nd to ha is al nt ti ra me ea ro li ri io le de co ta ec si ll se so no ma el
us ca ur la ol ve ch ck sh ph wh qu ee oo ou ai ay ow oi au ew ight ough ance ence ation ity ist ism age ure ent ant ate
ize ise ify ary ory ier ies ian ean
"""

COMMON = tuple(_COMMON.split())
PIECES = tuple(dict.fromkeys(_PIECES.split()))
