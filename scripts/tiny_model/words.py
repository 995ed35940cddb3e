"""The words that the corpus is filled with: lists and pairs only, no logic.

Everything here is common knowledge, written for this project.
"""

from __future__ import annotations


def _many(text: str) -> list[str]:
    return text.split()


NAMES = _many("""
    Anna Ben Clara David Emma Finn Grace Henry Iris Jack Kate Leo Mia Noah Olive Paul Rosa Sam Tara Vera Will Zoe
    Adam Bella Carl Daisy Eric Fiona George Hana Ivan Julia Kim Lucy Max Nina Omar Peter Ruby Tom
""")

ANIMALS = _many("""
    fox dog cat bear rabbit mouse horse cow sheep goat pig duck hen owl frog turtle lion tiger monkey elephant wolf
    deer squirrel hedgehog badger otter beaver swan crow eagle
""")

THINGS = _many("""
    ball book lamp chair table clock key box bag cup plate spoon hat coat shoe letter map rope bell basket bottle
    brush candle coin drum flag kite ladder mirror pen pencil pillow ring stone stick toy umbrella wheel blanket
    bucket ticket picture
""")

FOODS = _many("""
    apple pear plum peach cherry grape lemon orange banana carrot potato onion tomato bean bread cheese butter soup
    rice pasta cake pie honey milk egg cookie pancake salad sandwich melon
""")

PLACES = _many("""
    forest garden river lake mountain village farm beach island field town city park school library market castle
    bridge valley hill meadow harbor kitchen barn museum
""")

ADJECTIVES = _many("""
    small big old young brave kind happy sad quiet loud clever funny gentle hungry tired lonely curious proud
    careful lazy friendly shy strong tiny
""")

THING_ADJECTIVES = _many("""
    red blue green yellow white black golden silver shiny heavy light broken new old wooden warm soft round strange
    pretty
""")

COLOURS = _many("red blue green yellow white black brown orange purple pink gray gold silver")

WEATHER = ["sunny", "rainy", "windy", "cold", "warm", "snowy", "foggy", "cloudy", "bright", "stormy"]

TIMES = ["morning", "afternoon", "evening", "night", "day"]

FEELINGS = ["happy", "glad", "sad", "surprised", "tired", "proud", "calm", "excited", "worried", "grateful"]

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens", "Hungary": "Budapest",
    "Turkey": "Ankara", "Russia": "Moscow", "China": "Beijing", "Japan": "Tokyo", "India": "New Delhi",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia",
    "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Australia": "Canberra", "Belgium": "Brussels",
}  # fmt: skip

COLOUR_OF = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a banana": "yellow", "a tomato": "red",
    "a carrot": "orange", "milk": "white", "chocolate": "brown", "a lemon": "yellow", "blood": "red",
    "an orange": "orange", "the sun": "yellow", "a frog": "green", "a flamingo": "pink", "an elephant": "gray",
    "a strawberry": "red", "a plum": "purple", "the sea": "blue", "a leaf": "green",
}  # fmt: skip

SOUND_OF = {
    "dog": "barks", "cat": "meows", "cow": "moos", "sheep": "bleats", "pig": "grunts", "duck": "quacks",
    "horse": "neighs", "lion": "roars", "wolf": "howls", "owl": "hoots", "frog": "croaks", "mouse": "squeaks",
    "bee": "buzzes", "snake": "hisses", "crow": "caws",
}  # fmt: skip

YOUNG_OF = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "pig": "piglet",
    "duck": "duckling", "hen": "chick", "bear": "cub", "lion": "cub", "goat": "kid", "deer": "fawn", "frog": "tadpole",
    "swan": "cygnet", "goose": "gosling",
}  # fmt: skip

LEGS_OF = {
    "dog": 4, "cat": 4, "horse": 4, "cow": 4, "bird": 2, "duck": 2, "spider": 8, "ant": 6, "bee": 6, "fish": 0,
    "snake": 0, "person": 2, "frog": 4, "beetle": 6, "octopus": 8,
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "day": "night", "happy": "sad", "old": "young",
    "open": "closed", "wet": "dry", "light": "dark", "high": "low", "loud": "quiet", "early": "late", "full": "empty",
    "hard": "soft", "left": "right", "long": "short", "near": "far", "rich": "poor", "strong": "weak", "thick": "thin",
    "true": "false", "in": "out", "clean": "dirty", "first": "last", "good": "bad", "heavy": "light", "win": "lose",
}  # fmt: skip

PAST = {
    "go": "went", "see": "saw", "eat": "ate", "run": "ran", "take": "took", "give": "gave", "find": "found",
    "make": "made", "come": "came", "know": "knew", "sing": "sang", "swim": "swam", "write": "wrote", "read": "read",
    "sleep": "slept", "drink": "drank", "fly": "flew", "buy": "bought", "think": "thought", "walk": "walked",
    "play": "played", "jump": "jumped", "help": "helped", "open": "opened", "begin": "began",
}  # fmt: skip

JOBS = {
    "baker": "bakes bread", "farmer": "grows food", "teacher": "teaches children", "doctor": "helps sick people",
    "pilot": "flies planes", "cook": "makes meals", "painter": "paints pictures", "writer": "writes books",
    "sailor": "sails ships", "driver": "drives a car", "singer": "sings songs", "builder": "builds houses",
    "gardener": "plants flowers", "nurse": "cares for patients", "tailor": "makes clothes", "fisher": "catches fish",
}  # fmt: skip

CAN_DO = {
    "fish": ["swim"], "bird": ["fly", "sing", "walk"], "dog": ["run", "swim", "bark", "walk"],
    "horse": ["run", "swim", "jump", "walk"], "frog": ["jump", "swim"], "snake": ["swim"], "bee": ["fly"],
    "cat": ["run", "jump", "climb", "walk"], "monkey": ["climb", "run", "jump", "walk"],
    "duck": ["swim", "fly", "walk"], "cow": ["walk", "run"], "owl": ["fly"],
}  # fmt: skip

ABILITIES = ["swim", "fly", "sing", "walk", "run", "bark", "jump", "climb"]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

MONTHS = _many("January February March April May June July August September October November December")

NUMBER_WORDS = _many("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
""")

HOW_TO = {
    "make tea": ["Boil some water.", "Put a tea bag in a cup.", "Pour the water over it.", "Wait three minutes."],
    "make a sandwich": ["Take two slices of bread.", "Put cheese on one slice.", "Add a leaf of salad.", "Close it."],
    "plant a seed": ["Fill a pot with soil.", "Push the seed into the soil.", "Water it.", "Put it in the sun."],
    "wash my hands": ["Wet your hands.", "Use some soap.", "Rub them for twenty seconds.", "Rinse and dry them."],
    "draw a house": ["Draw a square.", "Put a triangle on top.", "Add a door.", "Add two windows."],
    "boil an egg": ["Put the egg in a pot.", "Cover it with water.", "Boil it for eight minutes.", "Cool it down."],
    "write a letter": ["Take a sheet of paper.", "Write a greeting.", "Say what you want to say.", "Sign your name."],
    "fly a kite": ["Find an open field.", "Wait for some wind.", "Hold the string.", "Run and let the kite go."],
    "paint a wall": ["Clean the wall.", "Cover the floor.", "Use a wide brush.", "Let the paint dry."],
    "fall asleep": ["Turn off the light.", "Put your phone away.", "Close your eyes.", "Breathe slowly."],
}  # fmt: skip

GROUPS = {
    "animals": ANIMALS, "foods": FOODS, "colors": COLOURS, "names": NAMES, "days": DAYS, "months": MONTHS,
    "countries": list(CAPITALS), "places": PLACES, "things": THINGS, "jobs": list(JOBS),
}  # fmt: skip

SMALL_TALK = {
    "How are you?": ["I am fine, thank you.", "I am doing well. How are you?", "Very well, thanks for asking."],
    "Who are you?": ["I am a tiny language model.", "I am a very small assistant.", "A tiny model that likes to help."],
    "What can you do?": ["I can chat, add small numbers and tell short stories.", "I can answer simple questions."],
    "Thank you!": ["You are welcome.", "My pleasure.", "Happy to help."],
    "Thanks for your help.": ["You are welcome.", "Any time.", "Glad I could help."],
    "Good night.": ["Good night, sleep well.", "Sweet dreams.", "Good night to you too."],
    "Goodbye!": ["Goodbye, see you soon.", "Take care.", "Bye, have a good day."],
    "Tell me a joke.": [
        "Why did the clock go to school? To learn the time.",
        "What has a face and no eyes? A clock.",
        "Why was the book sad? It had too many problems.",
        "What kind of key opens a banana? A monkey.",
    ],
    "Are you a person?": ["No, I am a small computer program.", "No, I am a language model."],
    "Can you help me?": ["Of course. What do you need?", "Yes, I will try my best.", "Sure, tell me more."],
    "I am bored.": ["You could read a book.", "Let me tell you a story.", "How about a walk in the park?"],
    "I am sad.": ["I am sorry to hear that.", "I hope you feel better soon.", "Do you want to talk about it?"],
    "What is your favorite color?": ["I like blue the most.", "Green, like the grass.", "I like all of them."],
    "Sing a song.": ["La la la, the sun is up.", "Row, row, row along the river.", "Ding dong, the bells ring."],
}
