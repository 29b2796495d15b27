"""Methods that train the network's own weights: its decoder, or all of it."""

from vlsm.networks.hooks import Tuner


class DecoderTuner(Tuner):
    """Trains the parameters that follow the network's encoders, nothing else."""

    def trained_network_parameters(self, network):
        return network.decoder_names()


class FullTuner(DecoderTuner):
    """Trains the network itself, as its `full_tuning_names` have it."""

    def trained_network_parameters(self, network):
        return network.full_tuning_names()
