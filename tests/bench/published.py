"""The networks as the papers' own code runs them, with the same weights as ours.

transformers' CLIPSeg modules in eager mode with eager attention, all 12 blocks of both encoders, every prompt
encoded, an adapter as two Linears and two ReLUs, the upsampler as a convolution of the enlarged features.
"""

import copy

import torch
from torch import nn


class PublishedAdapter(nn.Module):
    """x + relu(up(relu(down(x)))), with another adapter's weights."""

    def __init__(self, ours):
        super().__init__()
        r, d = ours.down.weight.shape
        self.down = nn.Linear(d, r)
        self.up = nn.Linear(r, d)
        self.load_state_dict(ours.state_dict())

    def forward(self, x):
        return x + self.up(self.down(x).relu()).relu()


def replace_tokens(x, at, vectors, over):
    """Tokens x with vectors at a position, in the place of `over` tokens."""
    return torch.cat([x[:, :at], vectors.expand(len(x), -1, -1), x[:, at + over :]], 1)


def causal_mask(length, device):
    mask = torch.full((length, length), torch.finfo(torch.float32).min, device=device)
    return mask.triu(1)[None, None]


class PublishedNetwork(nn.Module):
    """What both papers share: the frozen network, and an encoder's blocks one by one."""

    def __init__(self, network, method):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.method = method

    def towers(self):
        """The vision and the text transformer; versions of transformers nest them differently."""
        clip = self.network.clip
        vision = getattr(clip.vision_model, "vision_model", clip.vision_model)
        text = getattr(clip.text_model, "text_model", clip.text_model)
        return vision, text

    def encode(self, transformer, x, mask, adapters=(), contexts=(), at=0):
        """The output of every block; adapters: two for each of the first blocks, else none."""
        states = []
        for i, layer in enumerate(transformer.encoder.layers):
            after_attention, after_mlp = nn.Identity(), nn.Identity()
            if 2 * i < len(adapters):
                after_attention, after_mlp = adapters[2 * i : 2 * i + 2]
            attended = layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=mask)[0]
            x = x + after_attention(attended)
            x = x + after_mlp(layer.mlp(layer.layer_norm2(x)))
            if i + 1 < len(contexts):
                x = replace_tokens(x, at, contexts[i + 1], contexts.shape[1])
            states.append(x)
        return states


class PublishedAdapters(PublishedNetwork):
    """CLIPSeg with the adapters of one of our tuners: dense vl or shallow vl."""

    def __init__(self, network, tuner, method):
        super().__init__(network, method)
        self.vision_adapters = nn.ModuleList()
        self.text_adapters = nn.ModuleList()
        for ours, adapters in ((tuner.vision, self.vision_adapters), (tuner.text, self.text_adapters)):
            for place in ours:
                if method == "dense":
                    adapters.append(PublishedAdapter(ours[place]["attn"]))
                    adapters.append(PublishedAdapter(ours[place]["mlp"]))
                else:
                    adapters.append(PublishedAdapter(ours[place]))

    def forward(self, pixel_values, input_ids):
        vision, text = self.towers()
        in_vision, in_text = (), ()
        if self.method == "dense":
            in_vision, in_text = self.vision_adapters, self.text_adapters
        x = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
        states = self.encode(vision, x, None, in_vision)
        vision.post_layernorm(states[-1][:, 0])
        layers = self.network.config.extract_layers
        activations = [states[i] for i in layers]
        mask = causal_mask(input_ids.shape[1], input_ids.device)
        states = self.encode(text, text.embeddings(input_ids=input_ids), mask, in_text)
        row = torch.arange(len(input_ids), device=input_ids.device)
        end = input_ids.argmax(1)
        cond = self.network.clip.text_projection(text.final_layer_norm(states[-1])[row, end])
        if self.method == "shallow":
            activations = [adapter(x) for adapter, x in zip(self.vision_adapters, activations)]
            cond = cond + sum(adapter(states[i][row, end]) for adapter, i in zip(self.text_adapters, layers))
        return self.network.decoder(tuple(activations), cond).logits[:, None]


class PublishedLearner(PublishedNetwork):
    """CLIPSeg with CoOp or VPT and the learnable upsampler."""

    def __init__(self, network, tuner, method):
        super().__init__(network, method)
        self.context = nn.Parameter(tuner.context.detach().clone())
        self.upsampler = copy.deepcopy(tuner.upsampler)

    def forward(self, pixel_values, input_ids):
        vision, text = self.towers()
        n = self.context.shape[1]
        x = vision.embeddings(pixel_values, interpolate_pos_encoding=True)
        tokens = x.shape[1]
        in_vision, in_text = (), ()
        if self.method == "vpt":
            in_vision = self.context
            x = replace_tokens(x, tokens, in_vision[0], 0)
        states = self.encode(vision, vision.pre_layrnorm(x), None, contexts=in_vision, at=tokens)
        t = text.embeddings.token_embedding(input_ids)
        end = input_ids.argmax(1)
        if self.method == "coop":
            in_text = self.context
            t = replace_tokens(t, 1, in_text[0], 0)
            end = end + n
        length = t.shape[1]
        t = t + text.embeddings.position_embedding.weight[:length]
        t = self.encode(text, t, causal_mask(length, t.device), contexts=in_text, at=1)[-1]
        row = torch.arange(len(t), device=t.device)
        cond = self.network.clip.text_projection(text.final_layer_norm(t)[row, end])
        features = self.decode(states, cond)[:, 1:tokens]
        side = round((tokens - 1) ** 0.5)
        return self.upsample(features.transpose(1, 2).unflatten(2, (side, side)))

    def decode(self, states, cond):
        decoder = self.network.decoder
        layers = self.network.config.extract_layers[::-1]
        z = 0
        for k, (i, reduce, layer) in enumerate(zip(layers, decoder.reduces, decoder.layers)):
            z = z + reduce(states[i])
            if k == decoder.conditional_layer:
                z = decoder.film_mul(cond)[:, None] * z + decoder.film_add(cond)[:, None]
            z = layer(z, attention_mask=None)
        return z

    def upsample(self, z):
        up = self.upsampler
        enlarged = nn.functional.interpolate(z, scale_factor=up.factor, mode="bilinear", align_corners=False)
        decoded = self.network.decoder.transposed_convolution(z)
        return (1 - up.ratio) * decoded + up.ratio * up.conv(enlarged)


def published_network(network, tuner, method):
    """The published way of running one of our methods on transformers' network."""
    network_class = PublishedAdapters if method in ("dense", "shallow") else PublishedLearner
    return network_class(network, tuner, method)
