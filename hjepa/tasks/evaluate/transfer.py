"""Transfer: linear and k-NN accuracy of the same features on another dataset."""

from dataclasses import dataclass, replace

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.data.datamodule import DataModule
from hjepa.tasks.evaluate.features import Data, Features
from hjepa.tasks.evaluate.linear_knn import KNNProbe, LinearProbe
from hjepa.tasks.evaluate.protocol import EvalContext, Scores


@dataclass(frozen=True)
class Transfer:
    """Linear probe and k-NN on another dataset, whose images are resized to the encoder's size.

    Args:
        dataset: None where none was chosen; node: its config.
        linear, knn: how its features are judged.
    """

    dataset: DataModule | None
    node: Config | None
    linear: LinearProbe
    knn: KNNProbe

    def check(self, study: EvalContext) -> None:
        """Refuse to transfer to nothing, and to images that cannot be read or have no labels."""
        there = self.there(study)
        try:
            there.data.parts  # noqa: B018  # loads them
        except UserError as error:
            raise UserError(f"In task.transfer, {error}") from error

    def there(self, study: EvalContext) -> EvalContext:
        """The same run on the other dataset."""
        if self.dataset is None or self.node is None:
            raise UserError("task.protocols: transfer needs a dataset to transfer to, such as dataset@task.transfer=cifar100.")
        size = study.run.encoder.image_size
        self.dataset.image_size = size
        counts = study.data.counts
        data = Data(self.dataset, self.node | {"image_size": size}, study.data.test, counts["train"], counts["test"])
        features = study.features
        return replace(
            study, data=data, features=Features(study.run, data, features.folder, features.depths, features.batch_size)
        )

    def about(self, study: EvalContext) -> str:
        data = self.there(study).data
        name = data.key.get("name") or data.key.get("root") or type(data.dataset).__name__
        return f"Transfer to {name}, accuracy, {data.describe()}"

    def __call__(self, study: EvalContext) -> Scores:
        there = self.there(study)
        linear, knn = self.linear(there), self.knn(there)
        return {
            source: {f"{name}/linear": value for name, value in columns.items()}
            | {f"{name}/knn": value for name, value in knn[source].items()}
            for source, columns in linear.items()
        }
