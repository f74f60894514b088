"""Word lists the task families share: short, few, and a single token each once the tokenizer is trained."""

NAMES = tuple("Ann Ben Dan Eva Ivy Jack Kim Leo Max Mia Nina Omar Paul Rosa Sam Tom".split())
OBJECTS = tuple("apples books cards coins cups eggs hats keys maps pens pins rings shells stamps".split())
TRAITS = tuple("bold busy calm fit happy kind loud neat old proud quick rich shy strong tall wise".split())
WORDS = tuple("bell boat cat cup dog door fish hat lamp leaf map milk moon rain red sea star sun tree wind".split())
PETS = tuple("bird cat cow dog fish frog goat hen horse mouse pig rabbit".split())
CITIES = tuple("Berlin Cairo Delhi Lima London Madrid Oslo Paris Quito Rome Tokyo Vienna".split())
COLOURS = tuple("black blue brown gold green grey pink purple red silver white yellow".split())
FOODS = tuple("beans bread cake cheese corn pasta pizza rice salad soup stew toast".split())
