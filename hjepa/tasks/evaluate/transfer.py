"""Transfer: linear and k-NN accuracy of the same network's features on another dataset."""

from dataclasses import dataclass, field, replace

from hjepa.config.errors import NotApplicable, UserError
from hjepa.config.identity import short_hash
from hjepa.data.datamodule import DataModule
from hjepa.tasks.evaluate.features import EvalData, Features
from hjepa.tasks.evaluate.linear_knn import KNNProbe, LinearProbe
from hjepa.tasks.evaluate.protocol import EvalContext, EvalProtocol, Scores


@dataclass(frozen=True)
class Transfer(EvalProtocol):
    """Linear and k-NN probes on another dataset, whose images are resized to the size that the encoder was trained on.

    Args:
        linear: Linear probe.
        knn: k-NN probe.
        dataset: Dataset to transfer to, None if none was chosen.
    """

    linear: LinearProbe
    knn: KNNProbe
    dataset: DataModule | None = None
    contexts: dict[Features, EvalContext] = field(default_factory=dict, init=False)  # so that the images are read once

    def check(self, context: EvalContext) -> None:
        target = self.target_context(context)
        try:
            target.labels()
        except UserError as error:
            raise UserError(f"In protocol.transfer, {error}") from error

    def target_context(self, context: EvalContext) -> EvalContext:
        """Return the context with the same run and the other dataset."""
        if self.dataset is None:
            raise NotApplicable(
                "protocol=[transfer] needs a dataset to transfer to, such as dataset@protocol.transfer.dataset=cifar100."
            )
        if context.features in self.contexts:
            return self.contexts[context.features]
        size, limits, features = context.run.encoder.image_size, context.data.limits, context.features
        self.dataset.image_size = size
        node = context.options["dataset"] | {"image_size": size}
        data = EvalData(self.dataset, node, context.data.test, limits["train"], limits["test"])
        target = Features(context.run, data, features.folder, features.depths, features.batch_size)
        self.contexts.clear()  # those of another run
        self.contexts[context.features] = replace(context, data=data, features=target)
        return self.contexts[context.features]

    def key(self, context: EvalContext) -> str:
        contents = self.target_context(context).data.key.get("contents") if self.dataset else None
        return short_hash([context.key, contents]) if contents else context.key

    def describe(self, context: EvalContext) -> str:
        data = self.target_context(context).data
        name = data.options.get("name") or data.options.get("root") or type(data.dataset).__name__
        return f"Transfer to {name}, accuracy, {data.describe()}"

    def score(self, context: EvalContext) -> Scores:
        target = self.target_context(context)
        linear, knn = self.linear.score(target), self.knn.score(target)
        return {
            source: {f"{label}/linear": value for label, value in columns.items()}
            | {f"{label}/knn": value for label, value in knn[source].items()}
            for source, columns in linear.items()
        }
