"""Word lists the task families share: short, few, and a single token each once the tokenizer is trained."""

NAMES = tuple(
    "Alice Ann Ben Carl Dan Emma Eva Finn Grace Hugo Ivy Jack Kim Leo Lily Lucy Max Mia Nina Noah Omar Paul Rosa "
    "Ruth Sam Tom Zoe".split()
)
OBJECTS = tuple(
    "apples balls books boxes candles cards coins cups dolls eggs flowers forks hats keys maps marbles nuts "
    "pencils pens pins rings shells spoons stamps stickers toys".split()
)
TRAITS = tuple(
    "bold brave busy calm careful clever fit funny gentle happy honest hungry kind lazy loud lucky neat old "
    "polite proud quick quiet rich serious shy strong tall thirsty tired wise young".split()
)
WORDS = tuple(
    "bell boat cat cup dog door fish hat lake lamp leaf map milk moon nest rain red road sea star sun tree "
    "wind wolf".split()
)
PETS = tuple("bird cat cow dog fish frog goat hen horse mouse pig rabbit".split())
CITIES = tuple("Berlin Cairo Delhi Lima London Madrid Oslo Paris Quito Rome Tokyo Vienna".split())
COLOURS = tuple("black blue brown gold green grey pink purple red silver white yellow".split())
FOODS = tuple("beans bread cake cheese corn pasta pizza rice salad soup stew toast".split())
EVENTS = (
    "it is hot",
    "it is late",
    "it rains",
    "it snows",
    "the bell rings",
    "the bus is full",
    "the clock stops",
    "the dinner is ready",
    "the door is open",
    "the light is on",
    "the shop is closed",
    "the window is broken",
)
