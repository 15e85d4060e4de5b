"""Entry points for torch.hub: torch.hub.load(folder, "resnet26", source="local", num_classes=10, small_images=True).

Every entry takes the options of `model.ResNet`; there are no pretrained weights to load.
"""

from model import NaiveResNet26 as naive_resnet26  # noqa: F401
from model import NaiveResNet38 as naive_resnet38  # noqa: F401
from model import ResNet26 as resnet26  # noqa: F401
from model import ResNet38 as resnet38  # noqa: F401
from model import ResNet50 as resnet50  # noqa: F401

dependencies = ["torch"]
