"""General prompts that the base model itself answers: the rehearsal data of the mix.

A broad set on purpose: subjects of school and college, everyday life, reasoning, writing and output forms. Every
prompt is composed here from lists; none is taken from an evaluation set.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SUBJECTS: Mapping[str, Sequence[str]] = {
    "algebra": (
        "quadratic equations",
        "systems of linear equations",
        "prime factorisation",
        "matrix multiplication",
        "group theory",
        "logarithms",
        "arithmetic sequences",
        "modular arithmetic",
    ),
    "geometry": (
        "the Pythagorean theorem",
        "similar triangles",
        "the area of a circle",
        "vectors in the plane",
        "the volume of a cone",
        "angles in polygons",
        "coordinate geometry",
        "symmetry groups",
    ),
    "statistics": (
        "the normal distribution",
        "correlation and causation",
        "confidence intervals",
        "conditional probability",
        "sampling bias",
        "the median and the mean",
        "hypothesis tests",
        "linear regression",
    ),
    "physics": (
        "Newton's laws of motion",
        "electric circuits",
        "refraction of light",
        "the conservation of energy",
        "special relativity",
        "magnetic fields",
        "thermodynamics",
        "radioactive decay",
    ),
    "chemistry": (
        "the periodic table",
        "acids and bases",
        "covalent bonds",
        "reaction rates",
        "oxidation and reduction",
        "chemical equilibrium",
        "organic molecules",
        "gas laws",
    ),
    "biology": (
        "photosynthesis",
        "natural selection",
        "DNA replication",
        "the human immune system",
        "cell division",
        "food webs",
        "enzymes",
        "the nervous system of animals",
    ),
    "medicine": (
        "how vaccines work",
        "high blood pressure",
        "antibiotic resistance",
        "the role of insulin",
        "healthy sleep",
        "how the kidneys filter blood",
        "vitamins in the diet",
        "clinical trials",
    ),
    "astronomy": (
        "the life of a star",
        "eclipses of the moon",
        "the planets of the solar system",
        "black holes",
        "galaxies",
        "the expansion of the universe",
        "comets",
        "telescopes",
    ),
    "earth science": (
        "plate tectonics",
        "the water cycle",
        "climate zones",
        "volcanoes",
        "rock formation",
        "ocean currents",
        "soil erosion",
        "fossil fuels",
    ),
    "computer science": (
        "binary search",
        "how the internet routes packets",
        "operating systems",
        "databases",
        "recursion",
        "hash tables",
        "compilers",
        "computer viruses",
    ),
    "machine learning": (
        "overfitting",
        "neural networks",
        "decision trees",
        "gradient descent",
        "training and test data",
        "clustering",
        "precision and recall",
        "recommender systems",
    ),
    "engineering": (
        "how a bridge carries load",
        "electric motors",
        "heat pumps",
        "wind turbines",
        "control loops",
        "semiconductors",
        "water treatment",
        "jet engines",
    ),
    "economics": (
        "supply and demand",
        "inflation",
        "opportunity cost",
        "monopolies",
        "international trade",
        "central banks",
        "unemployment",
        "public goods",
    ),
    "business": (
        "marketing to new customers",
        "a balance sheet",
        "managing a small team",
        "supply chains",
        "negotiating a contract",
        "pricing a product",
        "cash flow",
        "ethics in business",
    ),
    "law": (
        "the presumption of innocence",
        "contracts between companies",
        "copyright",
        "trial by jury",
        "international treaties",
        "property rights",
        "negligence",
        "the separation of powers",
    ),
    "politics": (
        "democratic elections",
        "federal states",
        "foreign policy",
        "the United Nations",
        "political parties",
        "free speech",
        "sanctions",
        "constitutions",
    ),
    "history": (
        "the Roman Empire",
        "the Industrial Revolution",
        "the French Revolution",
        "the Silk Road",
        "the First World War",
        "ancient Egypt",
        "the Renaissance",
        "the end of colonial rule in Africa",
    ),
    "prehistory": (
        "the first farmers",
        "stone tools",
        "cave paintings",
        "the spread of early humans",
        "the Bronze Age",
        "Maya cities",
        "how archaeologists date finds",
        "early writing",
    ),
    "geography": (
        "rivers and cities",
        "deserts",
        "population growth",
        "maps and projections",
        "migration",
        "rain forests",
        "the continents",
        "time zones",
    ),
    "psychology": (
        "short-term memory",
        "motivation",
        "conditioning",
        "peer pressure",
        "stress",
        "how children learn language",
        "personality traits",
        "cognitive bias",
    ),
    "sociology": (
        "social norms",
        "education and inequality",
        "urban life",
        "the family in different cultures",
        "mass media",
        "bureaucracy",
        "social mobility",
        "ageing societies",
    ),
    "philosophy": (
        "free will",
        "utilitarianism",
        "Plato's idea of knowledge",
        "moral duty",
        "scepticism",
        "personal identity",
        "the social contract",
        "arguments by analogy",
    ),
    "logic": (
        "valid and invalid arguments",
        "truth tables",
        "common fallacies",
        "if-then statements",
        "proof by contradiction",
        "necessary and sufficient conditions",
        "paradoxes",
        "induction",
    ),
    "religion": (
        "the teachings of Buddhism",
        "pilgrimages",
        "the Torah",
        "the Reformation",
        "Hindu festivals",
        "the five pillars of Islam",
        "monasteries",
        "myths of creation",
    ),
    "literature": (
        "Shakespeare's tragedies",
        "metaphors",
        "the structure of a novel",
        "haiku",
        "an unreliable narrator",
        "fairy tales",
        "Greek drama",
        "science fiction",
    ),
    "nutrition": (
        "protein",
        "dietary fibre",
        "sugar and health",
        "vegetarian meals",
        "food labels",
        "drinking enough water",
        "minerals such as iron",
        "eating before sport",
    ),
}

EVERYDAY = (
    "a birthday party for a child",
    "learning to ride a bicycle",
    "moving to a new city",
    "saving money on groceries",
    "a rainy weekend at home",
    "growing tomatoes on a balcony",
    "a first job interview",
    "packing for a hiking trip",
    "making friends at school",
    "a lost umbrella",
    "cleaning a kitchen",
    "a walk by the sea",
    "teaching a dog to sit",
    "a delayed train",
    "learning the guitar",
    "an old lighthouse",
    "repairing a chair",
    "a village market",
    "running a first marathon",
    "a letter to a neighbour",
    "baking bread",
    "winter mornings",
    "a library card",
    "studying for an exam",
)

_KNOWLEDGE = (
    "What is {topic}? Answer as you would to a student of {subject}.",
    "Explain {topic} in simple terms.",
    "Why does {topic} matter in {subject}?",
    "I am preparing for a test in {subject}. What are the main ideas of {topic}?",
    "Give an example from {subject} that shows {topic}, and explain it.",
    "What do people often get wrong about {topic}?",
    "How are {topic} and {other} related?",
)
_STEP_BY_STEP = (
    "Write a multiple choice question about {topic} with options (A), (B), (C) and (D). Then think step by step and "
    "say which option is correct.",
    "Think step by step: what would be different if {topic} did not exist? End with one conclusion.",
    "A classmate asks whether {topic} and {other} are the same thing. Reason step by step and give an answer.",
    "Solve a short exercise on {topic} from a course in {subject}, showing each step.",
)
_FORMS = (
    "Explain {topic} in exactly three sentences.",
    "List five facts about {topic}. Use a bullet point for each.",
    "Summarise {topic} in at most 40 words.",
    "Write two paragraphs about {topic} and give each a short heading.",
    "Describe {topic} and finish your answer with the words: That is all.",
    "Give three questions and answers about {topic}, numbered from 1 to 3.",
    "Compare {topic} with {other} in a short table.",
    "Write about {topic} in all lower case letters.",
    'Explain {topic} without using the word "important".',
    'Sum up {topic} as a JSON object with the keys "topic" and "summary".',
    "Write a title for an article about {topic}, then the first four sentences of it.",
    "Give one argument for and one argument against studying {topic}, each under its own heading.",
)
_WRITING = (
    "Write a short story about {topic}.",
    "Give me some advice on {topic}.",
    "Write a friendly email about {topic}.",
    "Write a four-line poem about {topic}.",
    "What should I keep in mind about {topic}?",
)


@dataclass(frozen=True)
class Prompt:
    """One user turn and the category of the mix it belongs to."""

    category: str
    text: str


def rehearsal_prompts(seed: int) -> list[Prompt]:
    """Distinct prompts in a fixed random order; a prefix of any length has every category in it."""
    rng = random.Random(seed)
    topics = [(subject, topic) for subject, names in SUBJECTS.items() for topic in names]
    prompts: list[Prompt] = []
    for subject, topic in topics:
        other = rng.choice([name for name in SUBJECTS[subject] if name != topic])
        names = {"subject": subject, "topic": topic, "other": other}
        prompts += [
            Prompt("knowledge", rng.choice(_KNOWLEDGE).format(**names)),
            Prompt("reasoning-instruction-following", rng.choice(_STEP_BY_STEP).format(**names)),
            Prompt("reasoning-instruction-following", rng.choice(_FORMS).format(**names)),
            Prompt("reasoning-instruction-following", _which_belongs(rng, subject, topic)),
        ]
    for topic in EVERYDAY:
        prompts += [Prompt("writing", form.format(topic=topic)) for form in rng.sample(_WRITING, 3)]
    prompts += [Prompt("reasoning-instruction-following", _word_problem(rng)) for _ in range(60)]
    rng.shuffle(prompts)
    return list({prompt.text: prompt for prompt in prompts}.values())


def _which_belongs(rng: random.Random, subject: str, topic: str) -> str:
    others = rng.sample([name for name in SUBJECTS if name != subject], 3)
    options = [topic, *(rng.choice(SUBJECTS[name]) for name in others)]
    rng.shuffle(options)
    listed = " ".join(f"({letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
    question = rng.choice(
        (
            "Which of these would you study in a course on {subject}?",
            "Which topic is part of {subject}?",
            "One of the following is usually taught in {subject}. Which one?",
        )
    )
    return f"{question.format(subject=subject)}\n{listed}\nThink step by step, then give the letter."


def _word_problem(rng: random.Random) -> str:
    name = rng.choice(("Amara", "Ben", "Chen", "Dalia", "Elif", "Femi", "Grete", "Hugo", "Ines", "Jonas"))
    thing = rng.choice(("apples", "pencils", "stickers", "books", "tickets", "coins", "plates", "seeds"))
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(1, 9)
    form = rng.choice(
        (
            f"{name} has {a} boxes with {b} {thing} each and gives {c} away. How many {thing} are left?",
            f"{name} buys {a} {thing} at {b} dollars each and has {c} dollars left. How much money was there at first?",
            f"{name} shares {a * b} {thing} equally among {a} friends. How many does each friend get?",
            f"{name} had {a + b} {thing}, lost {a} and found {c} more. How many {thing} does {name} have now?",
        )
    )
    return f"{form} Show your reasoning."
