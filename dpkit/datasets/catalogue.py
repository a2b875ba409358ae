"""The data sets that dpkit reads: what they are, whose they are, and which bytes they must be.

A checksum is that of the unpacked content, so a file may be packed anew. It says that a file is the published one; it
says nothing about the quality of the data. Numbers of examples are those of the published sets and public.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpkit.errors import DataError


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
      path: where it is expected below the data folder, unpacked; packed it has ".gz" behind it.
      sha256: of the unpacked content.
      size: bytes of the unpacked content; no more are ever unpacked.
      url: where exactly this content is published; ".gz" at its end: packed.
      why_no_url: where there is none.
      instead: another file that serves as well.
    """

    path: str
    sha256: str
    size: int
    url: str | None = None
    why_no_url: str = ""
    instead: File | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """The path without its last part."""
        return self.path.rpartition("/")[0]


@dataclass(frozen=True)
class Description:
    """One data set.

    Attributes:
      num_train, num_test: examples (E2E: references; Shakespeare: speeches).
      label: what is predicted.
      classes: how many different labels; 0 where the label is text.
      sensitive: attributes by which results can be split.
    """

    name: str
    title: str
    num_train: int
    num_test: int
    label: str
    classes: int
    sensitive: tuple[str, ...]
    licence: str
    citation: str
    files: tuple[File, ...]


_GITHUB = "https://raw.githubusercontent.com"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION = f"{_GITHUB}/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion"
_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases"
_DUTCH = f"{_GITHUB}/tailequy/fairness_dataset/abb5a18b822ba56a221c5311082e192e85000b95/Dutch_census"
_PROPUBLICA = f"{_GITHUB}/propublica/compas-analysis/bafff5da3f2e45eca6c2d5055faad269defd135a"
_SST2 = f"{_GITHUB}/eyalbd2/Reproducing-AutoPrompt/6288fb5bec9c572f2492875ae0111df5b6daed11/glue_data/SST-2"
_E2E = f"{_GITHUB}/tuetschek/e2e-dataset/ab0d967dd5729ce455ef14ba9ffafc456a335264"

_DESCRIPTIONS = (
    Description(
        name="digits",
        title="Optical recognition of handwritten digits, the part in scikit-learn",
        num_train=1_437,
        num_test=360,
        label="digit",
        classes=10,
        sensitive=(),
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        citation="E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, doi:10.24432/C50P49",
        files=(),
    ),
    Description(
        name="mnist",
        title="MNIST",
        num_train=60_000,
        num_test=10_000,
        label="digit",
        classes=10,
        sensitive=(),
        licence="CC BY-SA 3.0 (Y. LeCun and C. Cortes)",
        citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition, "
        "Proc. IEEE 86(11), 1998",
        files=(
            File(
                "image/mnist/train-images-idx3-ubyte",
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                47_040_016,
                f"{_MNIST}/train-images-idx3-ubyte.gz",
            ),
            File(
                "image/mnist/train-labels-idx1-ubyte",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                60_008,
                f"{_MNIST}/train-labels-idx1-ubyte.gz",
            ),
            File(
                "image/mnist/t10k-images-idx3-ubyte",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                7_840_016,
                f"{_MNIST}/t10k-images-idx3-ubyte.gz",
            ),
            File(
                "image/mnist/t10k-labels-idx1-ubyte",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                10_008,
                f"{_MNIST}/t10k-labels-idx1-ubyte.gz",
            ),
        ),
    ),
    Description(
        name="fashion",
        title="Fashion-MNIST",
        num_train=60_000,
        num_test=10_000,
        label="kind of clothing",
        classes=10,
        sensitive=(),
        licence="MIT (Zalando SE, 2017)",
        citation="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine "
        "learning algorithms, 2017, arXiv:1708.07747",
        files=(
            File(
                "image/fashion/train-images-idx3-ubyte",
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                47_040_016,
                f"{_FASHION}/train-images-idx3-ubyte.gz",
            ),
            File(
                "image/fashion/train-labels-idx1-ubyte",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                60_008,
                f"{_FASHION}/train-labels-idx1-ubyte.gz",
            ),
            File(
                "image/fashion/t10k-images-idx3-ubyte",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                7_840_016,
                f"{_FASHION}/t10k-images-idx3-ubyte.gz",
            ),
            File(
                "image/fashion/t10k-labels-idx1-ubyte",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                10_008,
                f"{_FASHION}/t10k-labels-idx1-ubyte.gz",
            ),
        ),
    ),
    Description(
        name="adult",
        title="UCI Adult (census income)",
        num_train=32_561,
        num_test=16_281,
        label="income above 50,000 dollars a year",
        classes=2,
        sensitive=("sex", "race", "age_group"),
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        citation="B. Becker, R. Kohavi, Adult, UCI, 1996, doi:10.24432/C5XW20; R. Kohavi, Scaling up the accuracy of "
        "naive-Bayes classifiers: a decision-tree hybrid, KDD 1996",
        files=(
            File(
                "tabular/adult/adult.data",
                "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
                3_974_305,
                f"{_UCI}/adult/adult.data",
            ),
            File(
                "tabular/adult/adult.test",
                "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
                2_003_153,
                f"{_UCI}/adult/adult.test",
            ),
        ),
    ),
    Description(
        name="dutch",
        title="Dutch census 2001",
        num_train=48_336,
        num_test=12_084,
        label="high-level occupation",
        classes=2,
        sensitive=("sex",),
        licence="no formal licence; distributed for research with citation",
        citation="T. Le Quy, A. Roy, V. Iosifidis, W. Zhang, E. Ntoutsi, A survey on datasets for fairness-aware "
        "machine learning, WIREs DMKD 12(3):e1452, 2022; P. van der Laan, The 2001 Census in the Netherlands, 2001",
        files=(
            File(
                "tabular/dutch/dutch_census_2001.arff",
                "0e7e3f32668919c239db820f625815e1ea834c71402cdea595e03ef08c8616ef",
                2_199_278,
                f"{_DUTCH}/dutch_census_2001.arff",
            ),
        ),
    ),
    Description(
        name="compas",
        title="COMPAS, recidivism within two years",
        num_train=4_939,
        num_test=1_233,
        label="recidivism within two years",
        classes=2,
        sensitive=("race", "sex", "age_cat"),
        licence="no formal licence; compiled by ProPublica from public records of Broward County, Florida",
        citation="J. Larson, S. Mattu, L. Kirchner, J. Angwin, How we analyzed the COMPAS recidivism algorithm, "
        "ProPublica, 23 May 2016",
        files=(
            File(
                "tabular/compas/compas-scores-two-years.noid.csv",
                "a5e5c34bfd2d1f065bb12a44c0323421baf74b98b97d585915a0c2e1513ecaba",
                2_076_659,
                why_no_url="ProPublica's file without names, birth dates and case numbers is not published",
                instead=File(
                    "tabular/compas/compas-scores-two-years.csv",
                    "c451db85908b2f7fef1d83203bedf6b71ecda0d5af468d82ae62178f91d0cc7d",
                    2_546_489,
                    f"{_PROPUBLICA}/compas-scores-two-years.csv",
                ),
            ),
        ),
    ),
    Description(
        name="sst2",
        title="Stanford Sentiment Treebank, two classes, as in GLUE",
        num_train=67_349,
        num_test=872,
        label="positive",
        classes=2,
        sensitive=(),
        licence="no formal licence; used for research",
        citation="R. Socher et al., Recursive deep models for semantic compositionality over a sentiment treebank, "
        "EMNLP 2013; A. Wang et al., GLUE, ICLR 2019",
        files=(
            File(
                "text/sst2/train.tsv",
                "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
                3_806_081,
                f"{_SST2}/train_full.tsv",
            ),
            File(
                "text/sst2/dev.tsv",
                "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
                94_931,
                f"{_SST2}/dev.tsv",
            ),
        ),
    ),
    Description(
        name="e2e",
        title="E2E NLG (restaurant descriptions)",
        num_train=42_061,
        num_test=4_693,
        label="a sentence for a meaning representation",
        classes=0,
        sensitive=(),
        licence="CC BY-SA 4.0",
        citation="J. Novikova, O. Dusek, V. Rieser, The E2E dataset: new challenges for end-to-end generation, SIGDIAL "
        "2017, arXiv:1706.09254; tokenised by S. Wiseman, S. Shieber, A. Rush, Learning neural templates for text "
        "generation, EMNLP 2018",
        files=(
            File(
                "text/e2e/trainset.rebuilt.csv",
                "af2ddd746b8620a2e3cfba17eaec4933198f08c81b12e4785fd0d567d447d202",
                14_084_949,
                why_no_url="it was rebuilt from a tokenised copy; the published trainset.csv differs in white space",
            ),
            File(
                "text/e2e/devset.csv",
                "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
                1_161_305,
                f"{_E2E}/devset.csv",
            ),
            File(
                "text/e2e/testset_w_refs.csv",
                "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
                1_310_822,
                f"{_E2E}/testset_w_refs.csv",
            ),
        ),
    ),
    Description(
        name="shakespeare",
        title="Speeches of Shakespeare's plays by speaker",
        num_train=30_876,
        num_test=0,
        label="next character or word",
        classes=0,
        sensitive=(),
        licence="public domain",
        citation="The Complete Works of William Shakespeare, The Tech, MIT, 1993; speaker = role in a play, as in LEAF "
        "(S. Caldas et al., arXiv:1812.01097), with no split: results are not LEAF results",
        files=(
            File(
                "federated/shakespeare_speeches.jsonl",
                "57921c663b7f6fa9c9356d8e9323d1a16d04e120339812ce47a49d97b4767739",
                9_525_817,
                why_no_url="it was extracted from 37 HTML pages and is not published in this form",
            ),
        ),
    ),
)

CATALOGUE = {description.name: description for description in _DESCRIPTIONS}


def describe(name: str) -> Description:
    """The description of the data set ``name``.

    Raises:
      DataError: there is none of this name.
    """
    if name not in CATALOGUE:
        raise DataError(f"there is no data set {name!r}; the known ones are {', '.join(CATALOGUE)}.")
    return CATALOGUE[name]
