r"""Every row of the paper's tables, full size or small enough for two CPU cores.

    speciarl train --config=configs/baselines.py:row=binary,tiny --workdir=DIR
    speciarl train --config=configs/baselines.py:row=binary --workdir=DIR \
        --config.judge.endpoints="('http://HOST:8000/v1',)" \
        --config.eval.judge.endpoints="('http://HOST:8001/v1',)"

With the word `tiny`: `cpu_smoke.py` (field guide, minutes); without: `qwen2_5_vl_7b_cub.py`, whose
hardware and hours apply. README.md lists the rows, what was measured, and what not yet.

    row=     zero_shot, be_specific (prompts), best_of_64: the base is scored, nothing is trained
             sft: supervised on the label alone, same images and epochs (the paper gives no more)
             binary (RFT), scale1, scale2, scale3: static rewards · speciarl: the dynamic reward
    algo=    grpo, dr_grpo, dapo, dapo_dynamic (groups without spread are drawn again), gspo, rloo
    n=       rollouts per image: 5, 10, 15
    support= siblings that the bar needs: 1 (the paper), m, or a share of n such as 0.3
    updates= of a step's rollouts: 2 (the paper)
    noise=   probability of a label moving a rung: 0.05, 0.10, 0.25
    images=  training images: 128, 1024, 2048, 3000; tiny takes the same share of its 2,000 and
             keeps its number of steps
    train=   cub, aircraft, flowers, food, pets, or mixed (as many of each data set)

Full size, epochs stay 15: fewer images mean fewer steps; 128 images are one batch. Flowers has
1,020 official training images: with the CoOp split set --config.data.source=flowers:coop=FILE, the
same in --config.data.eval_sources, --config.data.num_train=3000 and --config.train.num_steps=165.
"""

from speciarl_jax import config as schema
from speciarl_jax.config import recipes

EVALUATED = ("zero_shot", "be_specific", "best_of_64")
REWARDS = {"speciarl": "dynamic"} | {name: name for name in ("binary", *schema.REWARDS[3:])}
DEFAULTS = {
    "row": "speciarl",
    "algo": "grpo",
    "n": "10",
    "support": "1",
    "updates": "2",
    "noise": "0",
    "images": "3000",
    "train": "cub",
    "seed": "0",
}
EPOCHS = 15
DATASETS = ("cub", "flowers", "food", "pets", "cars", "aircraft")
SMALLEST = {"flowers": 1020}  # official training images, where there are fewer than 3,000
TINY_DOMAINS = {"cub": "birds", "aircraft": "aircraft", "flowers": "flowers", "pets": "dogs"}


def get_config(arg=None):
    """The recipe; `arg` is ``key=value,...`` out of `DEFAULTS`, and `tiny`."""
    parts = (arg or "").split(",")
    values = schema.parse_recipe_arg(",".join(p for p in parts if p != "tiny"), DEFAULTS)
    row = values["row"]
    if row not in (*EVALUATED, "sft", *REWARDS):
        known = ", ".join((*EVALUATED, "sft", *REWARDS))
        raise ValueError(f"row={row}: expected one of {known}")
    if values["algo"] not in recipes.ALGORITHMS:
        known = ", ".join(recipes.ALGORITHMS)
        raise ValueError(f"algo={values['algo']}: expected one of {known}")
    of_rollouts = ("algo", "n", "support", "noise")
    if row not in REWARDS and any(values[k] != DEFAULTS[k] for k in of_rollouts):
        raise ValueError(f"row={row}: samples no rollouts, so no {'=, '.join(of_rollouts)}=")
    config = _tiny(values) if "tiny" in parts else _full(values)
    config.seed = int(values["seed"])
    config.algo.label_noise = float(values["noise"])
    config.algo.bar_support = float(values["support"])
    recipes.set_algorithm(config, values["algo"])  # after the sizes, which dapo_dynamic multiplies
    config.name = "_".join(["baselines", *(p.replace("=", "-") for p in parts if p)])
    if row == "sft":
        config.algo.name, config.algo.kl_coef = "sft", 0.0
        config.train.sft_target = "answer"
    if row in EVALUATED:
        config.train.num_steps = 0
        config.eval.score_trained = False
        config.train.eval_every = 0
    if row == "best_of_64":
        config.eval.score_base = False
        config.eval.best_of, config.eval.prompts_per_batch = 64, 4
        config.eval.best_of_temperature, config.eval.best_of_top_p = 0.6, 0.95
    return config


def _base(name, values, more=""):
    """The recipe `name` of this folder with the row's reward and group size."""
    reward = REWARDS.get(values["row"], "dynamic")
    return recipes.neighbour(__file__, name, f"reward={reward},n={values['n']}{more}")


def _tiny(values):
    config = _base("cpu_smoke.py", values, f",seed={values['seed']},updates={values['updates']}")
    train, images = values["train"], int(values["images"]) * 2000 // 3000
    pictures = config.data.source.partition(":")[2]
    if train == "mixed":
        each = images // len(TINY_DOMAINS)
        domains = tuple(TINY_DOMAINS.values())
        options = f"train={each},validation=0,test=0,{pictures}"
        config.data.source = " + ".join(f"field_guide_{d}:{options}" for d in domains)
    elif train in TINY_DOMAINS:
        domains = (TINY_DOMAINS[train],)
        if train != "cub":  # birds have their 2,000 training pictures by default
            options = f"train=2000,validation=0,test=0,{pictures}"
            config.data.source = f"field_guide_{domains[0]}:{options}"
        config.data.num_train = images if images < 2000 else 0
    else:
        known = ", ".join((*TINY_DOMAINS, "mixed"))
        raise ValueError(f"train={train},tiny: not in the field guide, which has {known}")
    config.data.in_domain = tuple(f"field_guide_{domain}" for domain in domains)
    config.data.prompt = "field_guide_exact" if values["row"] == "be_specific" else "field_guide"
    if values["row"] == "best_of_64":
        config.data.num_eval = 60  # of 240 a domain: 15,360 answers
    return config


def _full(values):
    config = _base("qwen2_5_vl_7b_cub.py", values)
    train = values["train"]
    if train not in (*DATASETS, "mixed"):
        raise ValueError(f"train={train}: expected one of {', '.join((*DATASETS, 'mixed'))}")
    images = min(int(values["images"]), SMALLEST.get(train, 3000))
    config.data.source = " + ".join(DATASETS) if train == "mixed" else train
    config.data.in_domain = DATASETS if train == "mixed" else (train,)
    config.data.num_train = images
    config.data.prompt = "plain" if values["row"] == "zero_shot" else "specific"
    config.train.prompts_per_step = min(config.train.prompts_per_step, images)
    config.train.prompts_per_update = config.train.prompts_per_step // int(values["updates"])
    config.train.num_steps = EPOCHS * (images // config.train.prompts_per_step)
    return config
