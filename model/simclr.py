"""SimCLR's network: z = g(f(views)), an encoder f and a projection head g trained together.

The head is thrown away after training: the features h = f(x) transfer better than z by more than ten points.
Chen et al. 2020, arXiv:2002.05709, section 4.2; the layers as in the authors' model_util.py.
"""

from typing import Literal

from torch import Tensor, nn

HeadKind = Literal["none", "linear", "nonlinear", "nonlinear3"]

NUM_LAYERS = {"none": 0, "linear": 1, "nonlinear": 2, "nonlinear3": 3}


class ProjectionHead(nn.Sequential):
    """features (m, in_features) -> z (m, out_features), not yet normalised: the loss does that.

    in_features   the encoder's num_features, and the width of every hidden layer.
    kind          "none" is the identity, "linear" one layer, "nonlinear" the paper's two, "nonlinear3" SimCLRv2's
                  three (arXiv:2006.10029).
    out_features  D; 128 in the paper. "none" has no layer to set it: `out_features` is in_features then.

    A hidden layer is dense, BatchNorm, ReLU. The last is dense and a BatchNorm with γ but without β, which stays away
    through SyncBatchNorm.convert_sync_batchnorm. No dense layer has a bias, for the BatchNorm behind it would take it
    away again. Dense weights are drawn from N(0, 0.01²).
    """

    def __init__(self, in_features: int, *, kind: HeadKind = "nonlinear", out_features: int = 128) -> None:
        if kind not in NUM_LAYERS:
            raise ValueError(f"head {kind!r} is unknown: choose one of {', '.join(NUM_LAYERS)}")
        super().__init__()
        num_layers = NUM_LAYERS[kind]
        self.out_features = out_features if num_layers else in_features
        for i in range(num_layers):
            last = i == num_layers - 1
            width = out_features if last else in_features
            dense = nn.Linear(in_features, width, bias=False)
            nn.init.normal_(dense.weight, std=0.01)
            norm = nn.BatchNorm1d(width)
            self.extend([dense, norm])
            if last:
                norm.register_parameter("bias", None)  # BatchNorm1d(bias=False) is not in torch 2.11 yet
            else:
                self.append(nn.ReLU(inplace=True))


class SimCLR(nn.Module):
    """Encoder and head as one module, so that one wrapper (DDP, SyncBatchNorm, mixed precision) takes both."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, views: Tensor) -> Tensor:
        """views (2n, 3, S, S), view-major -> z (2n, D).

        One pass over all rows, as the authors do: each BatchNorm's statistics mix the two views. Two passes of n
        rows would give every view statistics, and so a gradient, of its own.
        """
        return self.head(self.encoder(views))
