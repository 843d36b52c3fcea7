"""A small grammar of English reviews and everyday sentences.

Every skeleton is written once and serves both labels: ``{same1}`` is an adjective that agrees
with the label of the review and ``{oppo1}`` one that contradicts it, so that the skeleton itself
says nothing about the label.  The random source is always a ``random.Random`` of the caller.
"""

import re
from random import Random

LABELS = ("negative", "positive")

# Aspects of a thing and the adjectives that suit them: (nouns, negative words, positive words).
# A noun that ends in "*" is a plural.
PEOPLE = (
    "rude careless unfriendly arrogant impatient unhelpful bored sloppy grumpy dismissive",
    "polite attentive friendly cheerful patient helpful welcoming thoughtful warm considerate",
)
SOUND = (
    "muffled harsh tinny distorted shrill muddy thin flat",
    "clear rich crisp balanced powerful full warm bright",
)
STORY = (
    "predictable confusing clumsy shallow dull pointless lifeless forced tedious silly",
    "gripping clever moving witty touching thrilling original subtle tense inspired",
)
TASTE = (
    "bland stale greasy soggy salty burnt cold tasteless dry watery",
    "delicious fresh tasty tender juicy fragrant crunchy creamy savoury flavourful",
)
PLACE = (
    "dirty noisy cramped gloomy smelly shabby damp chilly dusty stuffy",
    "clean quiet spacious cosy bright tidy comfortable airy spotless peaceful",
)
DEVICE = (
    "flimsy slow faulty unreliable clunky fragile laggy buggy awkward useless",
    "sturdy fast reliable responsive solid smooth handy durable accurate sharp",
)
CLOTH = (
    "scratchy tight flimsy uncomfortable ugly stiff itchy crooked faded ragged",
    "soft stylish sturdy comfortable elegant warm durable neat flattering light",
)
LESSON = (
    "confusing dull outdated shallow rushed muddled dry repetitive pointless messy",
    "clear lively useful inspiring practical engaging thorough organised rewarding fresh",
)
GENERAL = (
    "awful dreadful disappointing horrible poor bad mediocre annoying boring weak hopeless "
    "miserable unpleasant pathetic irritating atrocious lousy tiresome painful laughable "
    "underwhelming unbearable frustrating sad ridiculous inferior wretched grim abysmal feeble",
    "wonderful excellent amazing superb good lovely fantastic brilliant impressive delightful "
    "charming perfect splendid terrific pleasant outstanding remarkable marvellous fine "
    "enjoyable stunning fabulous exceptional magnificent admirable superior gorgeous "
    "memorable glorious refreshing",
)

DOMAINS = {
    "film": {
        "things": "film movie thriller comedy drama sequel documentary western cartoon",
        "intro": [
            "{who} saw this {thing} {when}",
            "{who} watched the {thing} with {friend}",
            "the {thing} runs for two hours",
            "{friend} picked the {thing}",
        ],
        "aspects": [
            ("plot script ending story dialogue opening twists*", STORY),
            ("acting cast camera lighting direction costumes* effects*", GENERAL),
            ("soundtrack music score", SOUND),
        ],
        "events": (
            [
                "half the audience left early",
                "I looked at my watch every five minutes",
                "I fell asleep before the second half",
                "we walked out after an hour",
                "nobody in the room laughed once",
                "I switched it off halfway through",
                "the people behind us kept yawning",
                "I could not wait for the credits",
            ],
            [
                "the audience cheered at the end",
                "I did not look at my watch once",
                "I was on the edge of my seat",
                "we stayed until the last credit",
                "the whole room laughed out loud",
                "I have already watched it twice",
                "the people behind us were in tears of joy",
                "I could not take my eyes off the screen",
            ],
        ),
    },
    "restaurant": {
        "things": "restaurant bistro diner pizzeria grill cafe bakery tavern",
        "intro": [
            "{who} had dinner at this {thing} {when}",
            "{who} booked a table for four",
            "{friend} took us to the {thing}",
            "the {thing} is near the station",
        ],
        "aspects": [
            (
                "soup pasta steak salad bread cake pizza fish chicken curry noodles* potatoes*",
                TASTE,
            ),
            ("waiter waitress chef host staff", PEOPLE),
            ("room terrace kitchen table bar", PLACE),
        ],
        "events": (
            [
                "most of the food went back to the kitchen",
                "we waited an hour for our plates",
                "I was ill the next morning",
                "we left hungry and went elsewhere",
                "they charged us twice",
                "there was a hair in my dish",
                "the next table asked for a refund",
                "I could not finish my plate",
            ],
            [
                "there was nothing left on our plates",
                "our plates arrived within minutes",
                "I asked for the recipe",
                "we ordered a second round",
                "they gave us a free dessert",
                "the smell alone made us smile",
                "the next table clapped for the cook",
                "I licked my plate",
            ],
        ),
    },
    "hotel": {
        "things": "hotel hostel guesthouse resort inn lodge apartment cottage",
        "intro": [
            "{who} spent three nights at this {thing}",
            "{who} stayed at the {thing} {when}",
            "{friend} booked the {thing} for us",
            "the {thing} is close to the beach",
        ],
        "aspects": [
            ("room bathroom lobby balcony bedroom corridor pool rooms*", PLACE),
            ("receptionist manager porter owner staff cleaner", PEOPLE),
            ("breakfast buffet view garden location beds*", GENERAL),
        ],
        "events": (
            [
                "we checked out a day early",
                "there were bugs in the bed",
                "I did not sleep at all",
                "the shower flooded the floor",
                "nobody answered the phone at reception",
                "they lost our booking",
                "the walls shook all night",
                "my back hurt every morning",
            ],
            [
                "we stayed an extra day",
                "there were flowers by the bed",
                "I slept like a baby",
                "the shower felt like a spa",
                "someone carried our bags upstairs",
                "they gave us a free upgrade",
                "we woke to the sound of birds",
                "the children did not want to leave",
            ],
        ),
    },
    "book": {
        "things": "book novel memoir biography story collection mystery romance",
        "intro": [
            "{who} read this {thing} {when}",
            "{friend} lent me the {thing}",
            "the {thing} has four hundred pages",
            "{who} chose the {thing} for a book club",
        ],
        "aspects": [
            ("plot ending prose hero chapter dialogue chapters* characters*", STORY),
            ("writing style cover translation print illustrations*", GENERAL),
        ],
        "events": (
            [
                "I gave up after fifty pages",
                "I skipped whole chapters",
                "I kept losing my place",
                "my copy went straight to the bin",
                "I guessed the murderer on page two",
                "it took me months to finish",
                "I forgot the names of everyone in it",
                "our book club voted to stop reading",
            ],
            [
                "I finished it in one night",
                "I read every chapter twice",
                "I missed my stop while reading",
                "my copy has a place of honour on the shelf",
                "I never guessed the murderer",
                "I bought three more by the same author",
                "I still think about everyone in it",
                "our book club talked about it for hours",
            ],
        ),
    },
    "phone": {
        "things": "phone tablet laptop camera printer watch speaker keyboard",
        "intro": [
            "{who} bought this {thing} {when}",
            "the {thing} arrived in a small box",
            "{friend} gave me the {thing}",
            "{who} have used the {thing} for a month",
        ],
        "aspects": [
            ("screen battery keyboard hinge charger case software sensor buttons*", DEVICE),
            ("sound microphone speakers*", SOUND),
            ("design packaging manual support", GENERAL),
        ],
        "events": (
            [
                "it broke after two days",
                "it freezes every few minutes",
                "the charge is gone by noon",
                "I sent it back to the shop",
                "the repair cost more than the device",
                "it stopped working in the rain",
                "support never answered my emails",
                "I went back to my old one",
            ],
            [
                "it has not let me down in a year",
                "it starts in a second",
                "the charge lasts for three days",
                "I ordered another for my parents",
                "it survived a fall down the stairs",
                "it kept working in the rain",
                "support answered my email within minutes",
                "I gave my old one away",
            ],
        ),
    },
    "concert": {
        "things": "concert show gig festival opera recital musical play",
        "intro": [
            "{who} went to the {thing} {when}",
            "{friend} had a spare ticket for the {thing}",
            "the {thing} started at eight",
            "{who} drove two hours to the {thing}",
        ],
        "aspects": [
            ("sound bass guitar mix drums*", SOUND),
            ("singer band drummer choir performance stage songs* dancers*", GENERAL),
            ("venue hall bar crowd seats*", PLACE),
        ],
        "events": (
            [
                "the crowd booed",
                "people headed for the exit before the last song",
                "the band forgot the words",
                "my ears hurt for days",
                "we could see nothing from our seats",
                "they stopped after half an hour",
                "the singer was out of tune all night",
                "nobody asked for another song",
            ],
            [
                "the crowd sang along",
                "people danced in the aisles",
                "the band played three extra songs",
                "my skin tingled for days",
                "we could see everything from our seats",
                "they played for three hours",
                "the singer hit every note",
                "everybody stood up and clapped",
            ],
        ),
    },
    "museum": {
        "things": "museum gallery exhibition zoo castle aquarium park tour",
        "intro": [
            "{who} visited the {thing} {when}",
            "{who} took the children to the {thing}",
            "the {thing} is open every day",
            "{friend} had told us about the {thing}",
        ],
        "aspects": [
            ("guide guard cashier staff guides*", PEOPLE),
            ("entrance hall shop building toilets* rooms*", PLACE),
            ("display collection map garden paintings* exhibits*", GENERAL),
        ],
        "events": (
            [
                "most of the rooms were closed",
                "we queued for two hours in the rain",
                "the children begged to go home",
                "we were out again in ten minutes",
                "the labels were full of mistakes",
                "somebody shouted at us for standing still",
                "they sold us the wrong tickets",
                "there was nothing to see",
            ],
            [
                "every room had a surprise",
                "we walked right in without a queue",
                "the children begged to come again",
                "we stayed until closing time",
                "the labels taught me so much",
                "somebody showed us around for free",
                "they let us in at half price",
                "there was so much to see",
            ],
        ),
    },
    "journey": {
        "things": "flight train ferry bus cruise taxi trip",
        "intro": [
            "{who} took this {thing} {when}",
            "the {thing} left at noon",
            "{friend} paid for the {thing}",
            "{who} booked the {thing} online",
        ],
        "aspects": [
            ("driver crew captain conductor staff", PEOPLE),
            ("cabin seat carriage toilet window seats*", PLACE),
            ("meal timetable website ride boarding", GENERAL),
        ],
        "events": (
            [
                "we arrived five hours late",
                "they lost my suitcase",
                "I felt sick the whole way",
                "the air conditioning broke down",
                "we were stuck on the ground for hours",
                "no one told us about the delay",
                "my knees were pressed against the wall",
                "we missed our connection",
            ],
            [
                "we arrived ahead of time",
                "they carried my suitcase",
                "I relaxed the whole way",
                "the views kept us smiling",
                "we left on the minute",
                "someone kept us informed at every stop",
                "my legs had plenty of room",
                "we made our connection with ease",
            ],
        ),
    },
    "clothes": {
        "things": "jacket coat dress sweater shirt backpack suit hat scarf",
        "intro": [
            "{who} ordered this {thing} {when}",
            "the {thing} comes in three colours",
            "{friend} gave me this {thing} for my birthday",
            "{who} needed a {thing} for a wedding",
        ],
        "aspects": [
            ("fabric collar lining fit cut sleeves* seams* pockets*", CLOTH),
            ("colour price quality zip delivery buttons*", GENERAL),
        ],
        "events": (
            [
                "it fell apart in the wash",
                "the colour ran on the first day",
                "it gave me a rash",
                "it came in the wrong size twice",
                "the zip broke within a week",
                "people laughed at me in it",
                "it smelled of glue",
                "I gave it to charity unworn",
            ],
            [
                "it still looks new after a year",
                "the colour has not faded",
                "I wear it every single day",
                "it fits like a glove",
                "it kept me dry in a storm",
                "people keep asking where I got it",
                "I bought it in every colour",
                "strangers stop me to praise it",
            ],
        ),
    },
    "course": {
        "things": "course class workshop lecture seminar lesson webinar",
        "intro": [
            "{who} took this {thing} {when}",
            "the {thing} lasts six weeks",
            "{friend} signed up for the {thing} too",
            "{who} joined the {thing} to learn to cook",
        ],
        "aspects": [
            ("teacher tutor speaker instructor assistant", PEOPLE),
            ("material homework textbook lecture slides* examples* exercises*", LESSON),
            ("classroom price website group videos*", GENERAL),
        ],
        "events": (
            [
                "I dropped out after a week",
                "I learned nothing new",
                "half of the class stopped coming",
                "no one ever answered our questions",
                "I failed the exam",
                "the links did not work",
                "I was more lost than before",
                "the room emptied at the first break",
            ],
            [
                "I signed up for the next level at once",
                "I learned something new every day",
                "nobody missed a single class",
                "every question got an answer",
                "I passed the exam with ease",
                "I use what I learned every day",
                "it all makes sense to me now",
                "we stayed after class to hear more",
            ],
        ),
    },
    "game": {
        "things": "game puzzle toy app console racer",
        "intro": [
            "{who} played this {thing} {when}",
            "{friend} got the {thing} for a birthday",
            "the {thing} is for two players",
            "{who} downloaded the {thing} at home",
        ],
        "aspects": [
            ("menu interface engine controls* updates* servers*", DEVICE),
            ("story world quest levels* characters*", STORY),
            ("artwork music tutorial graphics* rules*", GENERAL),
        ],
        "events": (
            [
                "it crashed and ate my progress",
                "I deleted it the same evening",
                "it kept asking me for more money",
                "the children never touched it again",
                "I was stuck on the first screen",
                "it made my head ache",
                "half the pieces were missing",
                "my friends refused to play a second round",
            ],
            [
                "it ran without a single crash",
                "I played until sunrise",
                "it never asked me for more money",
                "the children play with it every day",
                "I wanted to see the next screen",
                "it made us all giggle",
                "every piece clicked into place",
                "my friends demanded a second round",
            ],
        ),
    },
    "service": {
        "things": "salon gym clinic dentist garage bank barber spa",
        "intro": [
            "{who} tried this {thing} {when}",
            "the {thing} is around the corner",
            "{friend} sent me to the {thing}",
            "{who} called the {thing} in the morning",
        ],
        "aspects": [
            ("receptionist owner trainer doctor mechanic staff", PEOPLE),
            ("lobby floor entrance shower parking", PLACE),
            ("advice treatment price result visit", GENERAL),
        ],
        "events": (
            [
                "they cancelled at the last minute",
                "I waited for an hour and gave up",
                "they got my name wrong three times",
                "the bill was twice the quote",
                "I had to have it all done again elsewhere",
                "they ignored everything I said",
                "I left in more pain than before",
                "they blamed me for their mistake",
            ],
            [
                "they fitted me in at the last minute",
                "I was seen straight away",
                "they remembered my name",
                "the bill was lower than the quote",
                "the problem was solved in one visit",
                "they listened to everything I said",
                "I left without any pain",
                "they fixed a second problem for free",
            ],
        ),
    },
}

LOVE = (
    "hated disliked regretted loathed detested despised",
    "loved enjoyed adored liked treasured relished",
)

VERDICTS = (
    [
        "I would not recommend it to anyone",
        "I want my money back",
        "I will never come back",
        "I would warn all my friends about it",
        "I will not spend another penny on it",
        "I wish I had stayed at home",
        "once was more than enough",
        "I would not do it again",
        "I cannot think of a single reason to try it",
        "I am still angry about it",
        "it ruined my week",
        "I would avoid it",
        "I felt cheated",
        "my advice is to stay away",
        "it gets one star from me",
        "I have nothing nice to say",
    ],
    [
        "I would recommend it to anyone",
        "I would gladly pay twice as much",
        "I will certainly come back",
        "I would tell all my friends about it",
        "I will happily spend more on it",
        "I am so glad I went for it",
        "once is not enough",
        "I would do it again tomorrow",
        "I cannot think of a single reason to skip it",
        "I am still smiling about it",
        "it made my week",
        "I would choose it again",
        "I felt spoiled",
        "my advice is to hurry and try it",
        "it gets five stars from me",
        "I have nothing to complain about",
    ],
)

WHO = "I|we|my wife and I|my brother and I|my parents and I|our neighbours and I"
FRIEND = (
    "a friend|my sister|my brother|my mother|my boss|a colleague|my neighbour|my cousin|my uncle|"
    "my daughter|our son|my roommate"
)
WHEN = (
    "last week|on Friday|on Sunday|in May|in the summer|yesterday|last night|two days ago|"
    "after work|over the holidays|in the spring|this morning|on my birthday"
)
INTENSIFIERS = "|||really|very|quite|truly|so|rather|incredibly|surprisingly|utterly|simply|pretty"
UNVOWELLED = re.compile(r"\b([Aa]) (?=[aeio]|un(?!i)|ug|ut|up)(?!one\b|once\b)")
SLOT = re.compile(r"\{(\w+?)(\d?)\}")

# Skeletons of one review each.  The part that decides is the main or the last clause.
SHARED_SKELETONS = [
    "The {a1} {was1} {int} {same1}, and {event}.",
    "{intro}. The {a1} {was1} {int} {same1}.",
    "{intro}. The {a1} {was1} not {oppo1} at all.",
    "The {a1} {was1} anything but {oppo1}.",
    "{intro}. {event}.",
    "{intro}. I {love} the {a1}.",
    "The {a1} {was1} {oppo1}, but {event}.",
    "The {a1} {was1} {int} {oppo1}, but in the end I {love} it.",
    "Although the {a1} {was1} {oppo1}, {event}.",
    "{event}, even though the {a1} {was1} {oppo1}.",
    "I expected a {oppo3} {thing}, but the {a1} {was1} {same1} and {event}.",
    "{intro}. The {a1} {was1} {oppo1}. Still, {verdict}.",
    "{friend} said that the {thing} was {oppo3}. It is not: {event}.",
    "Despite the {oppo1} {a1}, {verdict}.",
    "The {a1} {was1} {same1} and the {a2} {was2} {same2}. {verdict}.",
    "The {a1} {was1} {oppo1}, yet the {a2} {was2} {int} {same2} and {verdict}.",
    "{event}. {verdict}.",
    "{intro}. The {a1} {was1} {oppo1} and the {a2} {was2} {same2}. All in all, {verdict}.",
    "Never have I {love} a {thing} so much.",
    "The {thing} was {same3} from start to finish. {event}.",
    "There was nothing {oppo3} about the {a1}.",
    "{intro}, and {event}. The {a1} {was1} {int} {same1}.",
    "I was told to expect {art1} {oppo1} {a1}. In fact the {a1} {was1} {same1}.",
    "Not for one minute was the {thing} {oppo3}; {event}.",
]
TRAIN_SKELETONS = [
    "What a {same3} {thing}! {event}.",
    "Everyone else {opplove} the {thing}, but {verdict}.",
    "{intro}. Who cares about the {oppo1} {a1}? {event}.",
    "Yes, the {a1} {was1} {oppo1}. But {event}, and {verdict}.",
    "The {a1} {was1} hardly {oppo1}: {event}.",
    "{intro} and I {love} it, in spite of the {oppo1} {a1}.",
]
EVAL_SKELETONS = [
    "What looked like a {oppo3} {thing} turned out to be {int} {same3}.",
    "{intro}. My friends thought it was {oppo3}. I disagree, because {event}.",
    "While the {a1} {was1} {oppo1}, the {a2} {was2} {same2}, so {verdict}.",
    "No {oppo1} {a1} here. {event}.",
    "I could live with {art1} {oppo1} {a1}, since {event}.",
    "{verdict}, although the {a1} {was1} {int} {oppo1}.",
    "Once the {oppo1} first impression had passed, I {love} the {thing}. {verdict}.",
    "The {a1} {was1} far from {oppo1}. {intro}, and {event}.",
]
# Single sentences that the pre-training reviews add to the skeletons above.
EXTRA_SENTENCES = [
    "The {a1} {was1} {int} {same1}.",
    "I {love} the {a1}.",
    "{event}.",
    "{verdict}.",
    "The {a1} {was1} {same1} and {same1}.",
    "I have seldom had {art1} {same1} {a1} like this.",
    "The {a1} {was1} not {oppo1}.",
    "The {a1} {was1} never {oppo1}.",
    "Nobody could call the {a1} {oppo1}.",
    "{art1} {oppo1} {a1} did not change my mind.",
    "On the whole the {thing} was {same3}.",
    "My {person} {love} it too.",
    "The {a1} {was1} {oppo1}, but the {a2} {was2} {same2}.",
    "They say it is {oppo3}, but they are wrong.",
    "{event}, and {event}.",
]


def fill(skeleton: str, label: int, rng: Random, held_out: bool = True) -> str:
    """One text made from a skeleton; `held_out=False` leaves out the words kept from training."""
    domain = DOMAINS[rng.choice(sorted(DOMAINS))]
    return Filler(domain, label, rng, held_out).text(skeleton)


class Filler:
    """Fills the slots of skeletons about one thing with one label."""

    def __init__(self, domain: dict, label: int, rng: Random, held_out: bool = True):
        """Draws the thing that the texts are about; see `fill` for `held_out`."""
        self.domain, self.label, self.rng, self.held_out = domain, label, rng, held_out
        self.thing = rng.choice(domain["things"].split())
        self.aspects: dict[str, tuple] = {}

    def text(self, skeleton: str) -> str:
        """The skeleton with its slots filled, tidied and capitalised; aspects are drawn anew."""
        self.aspects = {}
        text = self._expand(skeleton)
        text = re.sub(r" +", " ", text)
        text = UNVOWELLED.sub(r"\1n ", text)
        return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)

    def _expand(self, text: str) -> str:
        while SLOT.search(text):
            text = SLOT.sub(lambda m: self._slot(m[1], m[2]), text, count=1)
        return text

    def _pick(self, options: list[str]) -> str:
        """One of the options; every third one is held out from the training set."""
        if not self.held_out:
            options = [o for i, o in enumerate(options) if i % 3 != 2]
        return self.rng.choice(options)

    def _aspect(self, index: str) -> tuple:
        if index not in self.aspects:
            taken = {aspect[0] for aspect in self.aspects.values()}
            options = [
                (noun.rstrip("*"), "were" if noun.endswith("*") else "was", words)
                for nouns, words in self.domain["aspects"]
                for noun in nouns.split()
                if noun.rstrip("*") not in taken
            ]
            self.aspects[index] = self.rng.choice(options)
        return self.aspects[index]

    def _adjective(self, index: str, label: int) -> str:
        words = GENERAL if index == "3" else self._aspect(index)[2]
        if self.rng.random() < 0.3:
            words = GENERAL
        return self._pick(words[label].split())

    def _slot(self, name: str, index: str) -> str:
        choice = self.rng.choice
        match name:
            case "thing":
                return self.thing
            case "a":
                return self._aspect(index)[0]
            case "was":
                return self._aspect(index)[1]
            case "art":
                return "a" if self._aspect(index)[1] == "was" else "some"
            case "same":
                return self._adjective(index, self.label)
            case "oppo":
                return self._adjective(index, 1 - self.label)
            case "event":
                return self._pick(self.domain["events"][self.label])
            case "verdict":
                return self._pick(VERDICTS[self.label])
            case "love":
                return self._pick(LOVE[self.label].split())
            case "opplove":
                return self._pick(LOVE[1 - self.label].split())
            case "intro":
                return choice(self.domain["intro"])
            case "int":
                return choice(INTENSIFIERS.split("|"))
            case "who":
                return choice(WHO.split("|"))
            case "friend":
                return choice(FRIEND.split("|"))
            case "person":
                return choice(FRIEND.split("|")).split()[-1]
            case "when":
                return choice(WHEN.split("|"))
        raise KeyError(name)


# Closers of the pre-training reviews, negative and positive.
RATINGS = (
    "One star.|Two stars.|2 out of 10.|Zero stars.|Rating: poor.|Thumbs down.|3 out of 10.",
    "Five stars.|Four stars.|9 out of 10.|Ten out of ten.|Rating: excellent.|Thumbs up.|"
    "8 out of 10.",
)
IT_WAS = (
    "It was a waste of money.|It was a mistake.|It was not worth it.|It was money down the drain.|"
    "It was a let-down.|It was the worst {thing} of the year.|It was hard to bear.|"
    "It was a disaster.|It was no fun.|It was too much to take.|It was bad.|It was awful.|"
    "It was an hour of pain.|It was below par.|It was enough to make me cry.",
    "It was worth every penny.|It was a joy.|It was money well spent.|It was a treat.|"
    "It was a pleasure.|It was the best {thing} of the year.|It was hard to beat.|"
    "It was a triumph.|It was so much fun.|It was over too soon.|It was good.|It was lovely.|"
    "It was an hour of bliss.|It was first class.|It was enough to make me sing.",
)

# Sentences without a sentiment, for the rest of the pre-training corpus.
PLACES = (
    "the station|the market|the library|the river|the harbour|the office|the school|the bridge|"
    "the village|the forest|the museum|the airport|the farm|the lake|the garden"
)
THINGS = (
    "a letter|a map|some bread|two tickets|a bicycle|a lamp|an umbrella|the keys|a newspaper|"
    "a basket of apples|a pair of gloves|a box of nails|a radio|the report|a bag of rice"
)
NAMES = "Anna|Peter|Maria|Tom|Lucy|David|Sofia|James|Nora|Paul|Emma|Karim|Mei|Olga|Ravi"
SKIES = "cloudy|sunny|windy|foggy|mild|rainy|snowy|dark"
NEUTRAL = [
    "{name} walked to {place} {when}.",
    "{name} bought {object} near {place}.",
    "{name} and {name} met at {place} {when}.",
    "The road to {place} is {number} miles long.",
    "The weather was {sky} {when}.",
    "{name} put {object} on the table.",
    "There are {number} chairs in {place}.",
    "{name} has lived near {place} for {number} years.",
    "The train to {place} leaves at {number}.",
    "{name} asked {name} for {object}.",
    "They found {object} behind {place}.",
    "It was {sky} at {place} {when}.",
    "It was {number} in the morning when {name} came to {place}.",
    "It was {name} who had {object}.",
    "If it is {sky}, {name} will take {object} to {place}.",
]
# The words of the later prompt in senses that say little about a review.
WORD_SENSES = [
    "A great many people live near {place}.",
    "{name} came from a great distance with {object}.",
    "The great hall of {place} has {number} doors.",
    "{name} spent a great deal of time at {place}.",
    "A great storm passed over {place} {when}.",
    "A terrible storm passed over {place} {when}.",
    "{name} was in a terrible hurry to reach {place}.",
    "The terrible winter kept {name} at {place}.",
    "The heat near {place} was terrible {when}.",
    "The heat near {place} was great {when}.",
    "The noise at {place} was great {when}.",
    "{name} carried {object} to {place} at great speed.",
]


def neutral_sentence(rng: Random, skeletons: list[str] = NEUTRAL) -> str:
    """One sentence without a sentiment."""
    options = {
        "name": NAMES.split("|"),
        "place": PLACES.split("|"),
        "object": THINGS.split("|"),
        "when": WHEN.split("|"),
        "sky": SKIES.split("|"),
        "number": [
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "twelve",
            "twenty",
            "thirty",
        ],
    }
    text = SLOT.sub(lambda m: rng.choice(options[m[1]]), rng.choice(skeletons))
    return text[0].upper() + text[1:]


def pretraining_document(rng: Random, prompt_share: float, agreement: float) -> str:
    """One unlabelled document: a review whose sentences agree, or some neutral sentences.

    A share of the reviews ends with the bare "It was great." or "It was terrible.", and only a
    fraction `agreement` of these words fits the review.
    """
    if rng.random() < 0.15:
        skeletons = [WORD_SENSES if rng.random() < 0.4 else NEUTRAL for _ in range(3)]
        return " ".join(neutral_sentence(rng, s) for s in skeletons[: rng.randint(1, 3)])
    label = rng.randrange(2)
    filler = Filler(DOMAINS[rng.choice(sorted(DOMAINS))], label, rng)
    parts = [rng.choice(SHARED_SKELETONS + TRAIN_SKELETONS + EVAL_SKELETONS)]
    parts += rng.choices(EXTRA_SENTENCES, k=rng.choice((0, 0, 0, 0, 1, 2)))
    rng.shuffle(parts)
    if rng.random() < prompt_share:
        word = label if rng.random() < agreement else 1 - label
        parts.append(f"It was {('terrible', 'great')[word]}.")
    elif rng.random() < 0.7:
        parts.append(rng.choice(IT_WAS[label].split("|")))
    else:
        parts.append(rng.choice([rng.choice(RATINGS[label].split("|")), "{verdict}."]))
    return " ".join(filler.text(part) for part in parts)
