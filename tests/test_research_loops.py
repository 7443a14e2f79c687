"""Loops as people write them in research code; each must stay silent. They call optimizer.step() themselves."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from test_rules import found, loss_of, net, watching
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector
from torch.utils.checkpoint import checkpoint

from diagnostics import ClipByNorm, watch

STEPS = 5


def mlp(*sizes, activation=nn.ReLU):
    layers = []
    for into, out in pairwise(sizes):
        layers += [nn.Linear(into, out), activation()]
    return nn.Sequential(*layers[:-1])


def adam(model, lr=1e-3, **more):
    return torch.optim.Adam(model.parameters(), lr=lr, **more)


# generative


def dcgan():
    g, d = mlp(4, 16, 6), mlp(6, 16, 1)
    optimizer_g, optimizer_d = adam(g, betas=(0.5, 0.999)), adam(d, betas=(0.5, 0.999))
    bce = nn.BCEWithLogitsLoss()
    with watching({"g": g, "d": d}, [optimizer_g, optimizer_d]) as monitor:
        for _ in range(STEPS):
            d.zero_grad()
            bce(d(torch.randn(8, 6)), torch.ones(8, 1)).backward()
            fake = g(torch.randn(8, 4))
            bce(d(fake.detach()), torch.zeros(8, 1)).backward()
            optimizer_d.step()
            g.zero_grad()
            bce(d(fake), torch.ones(8, 1)).backward()  # adds to the discriminator's gradients too
            optimizer_g.step()
    return monitor


def dcgan_in_declared_windows(set_to_none=True):
    g, d = mlp(4, 16, 6), mlp(6, 16, 1)
    optimizer_g, optimizer_d = adam(g), adam(d)
    with watching({"g": g, "d": d}, [optimizer_g, optimizer_d], accumulate=2) as monitor:
        for _ in range(STEPS):
            optimizer_d.zero_grad(set_to_none=set_to_none)
            functional.softplus(-d(torch.randn(8, 6))).mean().backward()
            functional.softplus(d(g(torch.randn(8, 4)).detach())).mean().backward()
            optimizer_d.step()
            optimizer_g.zero_grad(set_to_none=set_to_none)
            for _ in range(2):
                functional.softplus(-d(g(torch.randn(8, 4)))).mean().backward()
            optimizer_g.step()
    return monitor


def dcgan_in_declared_windows_zeroed_in_place():
    return dcgan_in_declared_windows(set_to_none=False)


def wasserstein_gan_with_gradient_penalty():
    g, d = mlp(4, 16, 6), mlp(6, 16, 1)
    optimizer_g, optimizer_d = adam(g), adam(d)
    with watching({"g": g, "d": d}, [optimizer_g, optimizer_d]) as monitor:
        for step in range(3 * STEPS):
            real, z = torch.randn(8, 6), torch.randn(8, 4)
            optimizer_d.zero_grad()
            fake = g(z)
            alpha = torch.rand(8, 1)
            mixed = (alpha * real + (1 - alpha) * fake.detach()).requires_grad_()
            (gradient,) = torch.autograd.grad(d(mixed).sum(), mixed, create_graph=True)
            penalty = ((gradient.norm(2, dim=1) - 1) ** 2).mean()
            (
                -d(real).mean() + d(fake).mean() + 10 * penalty
            ).backward()  # reaches the generator, whose turn comes later
            optimizer_d.step()
            optimizer_g.zero_grad()
            if step % 5 == 0:
                (-d(g(z)).mean()).backward()
                optimizer_g.step()
    return monitor


def wasserstein_gan_with_weight_clipping():
    g, d = mlp(4, 16, 6), mlp(6, 16, 1)
    optimizer_g, optimizer_d = torch.optim.RMSprop(g.parameters()), torch.optim.RMSprop(d.parameters())
    with watching({"g": g, "d": d}, [optimizer_g, optimizer_d]) as monitor:
        for step in range(2 * STEPS):
            optimizer_d.zero_grad()
            (d(g(torch.randn(8, 4)).detach()).mean() - d(torch.randn(8, 6)).mean()).backward()
            optimizer_d.step()
            for parameter in d.parameters():
                parameter.data.clamp_(-0.01, 0.01)
            if step % 5 == 0:
                optimizer_g.zero_grad()
                (-d(g(torch.randn(8, 4))).mean()).backward()
                optimizer_g.step()
    return monitor


def pix2pix():
    g, d = mlp(6, 16, 6), mlp(12, 16, 1)
    optimizer_g, optimizer_d = adam(g), adam(d)
    bce = nn.BCEWithLogitsLoss()
    with watching({"g": g, "d": d}, [optimizer_g, optimizer_d]) as monitor:
        for _ in range(STEPS):
            a, b = torch.randn(8, 6), torch.randn(8, 6)
            fake = g(a)
            d.requires_grad_(True)
            optimizer_d.zero_grad()
            loss_fake = bce(d(torch.cat([a, fake.detach()], 1)), torch.zeros(8, 1))
            loss_real = bce(d(torch.cat([a, b], 1)), torch.ones(8, 1))
            ((loss_fake + loss_real) * 0.5).backward()
            optimizer_d.step()
            d.requires_grad_(False)
            optimizer_g.zero_grad()
            (bce(d(torch.cat([a, fake], 1)), torch.ones(8, 1)) + (fake - b).abs().mean()).backward()
            optimizer_g.step()
    return monitor


def cyclegan():
    nets = {name: mlp(6, 12, 6 if name.startswith("g") else 1) for name in ("g_a", "g_b", "d_a", "d_b")}
    both = torch.optim.Adam([*nets["g_a"].parameters(), *nets["g_b"].parameters()], lr=1e-3)
    critics = torch.optim.Adam([*nets["d_a"].parameters(), *nets["d_b"].parameters()], lr=1e-3)
    with watching(nets, [both, critics]) as monitor:
        for _ in range(STEPS):
            a, b = torch.randn(8, 6), torch.randn(8, 6)
            for name in ("d_a", "d_b"):
                nets[name].requires_grad_(False)
            both.zero_grad()
            fake_b, fake_a = nets["g_a"](a), nets["g_b"](b)
            cycle = (nets["g_b"](fake_b) - a).abs().mean() + (nets["g_a"](fake_a) - b).abs().mean()
            (cycle + (nets["d_a"](fake_b) - 1).square().mean() + (nets["d_b"](fake_a) - 1).square().mean()).backward()
            both.step()
            for name in ("d_a", "d_b"):
                nets[name].requires_grad_(True)
            critics.zero_grad()
            for name, real, fake in (("d_a", b, fake_b), ("d_b", a, fake_a)):
                d = nets[name]
                (0.5 * ((d(real) - 1).square().mean() + d(fake.detach()).square().mean())).backward()
            critics.step()
    return monitor


def diffusion_with_exponential_average():
    model = mlp(7, 32, 6, activation=nn.SiLU)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    with watching(model, optimizer, clip=ClipByNorm(1.0)) as monitor:
        for _ in range(STEPS):
            x, t, noise = torch.randn(8, 6), torch.rand(8, 1), torch.randn(8, 6)
            optimizer.zero_grad()
            noisy = x * (1 - t).sqrt() + noise * t.sqrt()
            functional.mse_loss(model(torch.cat([noisy, t], 1)), noise).backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for old, new in zip(average.parameters(), model.parameters(), strict=True):
                    old.mul_(0.999).add_(new, alpha=0.001)
    return monitor


def variational_autoencoder():
    class Vae(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.mu, self.logvar = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
            self.decoder = mlp(2, 8, 6)

        def forward(self, x):
            h = self.fc1(x).relu()
            mu, logvar = self.mu(h), self.logvar(h)
            return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()), mu, logvar

    model = Vae()
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            x = torch.randn(8, 6)
            optimizer.zero_grad()
            out, mu, logvar = model(x)
            (functional.mse_loss(out, x) - 0.5 * (1 + logvar - mu.square() - logvar.exp()).mean()).backward()
            optimizer.step()
    return monitor


def radiance_field_with_two_networks_and_one_optimizer():
    coarse, fine = mlp(3, 16, 4), mlp(3, 16, 4)
    variables = [*coarse.parameters(), *fine.parameters()]
    optimizer = torch.optim.Adam(variables, lr=5e-4)
    with watching({"coarse": coarse, "fine": fine}, optimizer) as monitor:
        for step in range(STEPS):
            x, target = torch.rand(16, 3), torch.rand(16, 4)
            loss = functional.mse_loss(coarse(x), target) + functional.mse_loss(fine(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * 0.1 ** (step / 250)
    return monitor


# language and vision


def nano_gpt():
    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.wte.weight

        def forward(self, x):
            return self.head(self.block(self.wte(x) + self.wpe(torch.arange(x.shape[1]))))

    model = Gpt()
    decay = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with watching(model, optimizer, clip=ClipByNorm(1.0), accumulate=4, scaler=scaler) as monitor:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * step / 4  # warm-up from 0
            for _ in range(4):
                x = torch.randint(0, 11, (4, 6))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = functional.cross_entropy(model(x).flatten(0, 1), x.flatten()) / 4
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
    return monitor


def transformers_style_accumulation_with_a_short_last_window():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=20)
    batches = 10
    with watching(model, optimizer, accumulate=4, clip=ClipByNorm(1.0)) as monitor:
        model.zero_grad()
        for _ in range(2):
            for batch in range(batches):
                (loss_of(model) / 4).backward()
                if (batch + 1) % 4 == 0 or batch + 1 == batches:
                    clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    model.zero_grad()
    return monitor


def timm_second_order():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward(create_graph=True)
            clip_grad_value_(model.parameters(), 0.5)
            optimizer.step()
            for parameter in model.parameters():  # as torch advises, against the reference cycle
                parameter.grad = None
    return monitor


def detection_with_a_dictionary_of_losses():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.box, self.label = mlp(6, 8, 8), nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, x, targets):
            h = self.trunk(x)
            return {"box": self.box(h).abs().mean(), "label": functional.cross_entropy(self.label(h), targets)}

    model = Detector()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            losses = model(torch.randn(8, 6), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    return monitor


def self_distillation_with_a_momentum_teacher():
    student, teacher = mlp(6, 8, 8), mlp(6, 8, 8)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters())
    with watching(student, optimizer) as monitor:
        for step in range(STEPS):
            x = torch.randn(8, 6)
            loss = -(teacher(x).softmax(-1) * student(x + 0.1).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(student.parameters(), 3.0)
            if step < 2:  # the last layer is kept still at first
                for parameter in student[-1].parameters():
                    parameter.grad = None
            optimizer.step()
            with torch.no_grad():
                for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
                    old.data.mul_(0.99).add_(0.01 * new.detach().data)
    return monitor


def siamese():
    encoder, predictor = mlp(6, 8, 4), mlp(4, 8, 4)

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.predictor = encoder, predictor

        def forward(self, x1, x2):
            z1, z2 = self.encoder(x1), self.encoder(x2)
            return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()

    model = Siamese()
    optimizer = torch.optim.SGD([{"params": encoder.parameters()}, {"params": predictor.parameters()}], lr=0.05)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            p1, p2, z1, z2 = model(torch.randn(8, 6), torch.randn(8, 6))
            loss = -(functional.cosine_similarity(p1, z2).mean() + functional.cosine_similarity(p2, z1).mean()) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return monitor


def byol_with_its_target_inside():
    class Byol(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.head = mlp(6, 8, 4), mlp(4, 8, 4)
            self.target = copy.deepcopy(self.online)
            for parameter in self.target.parameters():
                parameter.requires_grad = False

        def forward(self, x):
            with torch.no_grad():
                target = self.target(x)
            return -functional.cosine_similarity(self.head(self.online(x)), target.detach()).mean()

    model = Byol()
    optimizer = adam(model)  # the frozen target included
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            loss = model(torch.randn(8, 6))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for new, old in zip(model.online.parameters(), model.target.parameters(), strict=True):
                    old.lerp_(new, 0.01)
    return monitor


def graph_network_on_the_whole_graph():
    class Gcn(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x, adjacency):
            return self.two(adjacency @ self.one(adjacency @ x).relu()).log_softmax(1)

    model, x = Gcn(), torch.randn(12, 5)
    adjacency, labels, mask = torch.rand(12, 12) / 12, torch.randint(0, 3, (12,)), torch.arange(12) < 6
    optimizer = adam(model, lr=0.01, weight_decay=5e-4)
    with watching(model, optimizer) as monitor:
        for _ in range(2 * STEPS):
            model.train()
            optimizer.zero_grad()
            functional.nll_loss(model(x, adjacency)[mask], labels[mask]).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                model(x, adjacency)
    return monitor


def mixture_of_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 3) for _ in range(4))

        def forward(self, x):
            weights, chosen = self.gate(x).softmax(-1).max(-1)
            out = x.new_zeros(len(x), 3)
            for place, expert in enumerate(self.experts):
                mine = chosen == place
                if mine.any():
                    out[mine] = expert(x[mine]) * weights[mine, None]
            return out

    model = Experts()
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(4 * STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    return monitor


# reinforcement learning


def proximal_policy_optimisation():
    actor, critic = mlp(4, 8, 2, activation=nn.Tanh), mlp(4, 8, 1, activation=nn.Tanh)
    agent = nn.ModuleDict({"actor": actor, "critic": critic})
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5)
    with watching(agent, optimizer, clip=ClipByNorm(0.5)) as monitor:
        for update in range(2):
            optimizer.param_groups[0]["lr"] = 2.5e-4 * (1 - update / 2)
            with torch.no_grad():
                x = torch.randn(32, 4)
                action = torch.distributions.Categorical(logits=actor(x)).sample()
                old = torch.distributions.Categorical(logits=actor(x)).log_prob(action)
            for _ in range(2):
                for part in torch.randperm(32).chunk(4):
                    chosen = torch.distributions.Categorical(logits=actor(x[part]))
                    ratio = (chosen.log_prob(action[part]) - old[part]).exp()
                    advantage = torch.randn(8)
                    policy = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
                    value = critic(x[part]).square().mean()
                    optimizer.zero_grad()
                    (policy - 0.01 * chosen.entropy().mean() + 0.5 * value).backward()
                    clip_grad_norm_(agent.parameters(), 0.5)
                    optimizer.step()
    return monitor


def deep_q_network():
    online, target = mlp(4, 16, 2), mlp(4, 16, 2)
    target.load_state_dict(online.state_dict())
    optimizer = adam(online)
    with watching({"online": online, "target": target}, optimizer) as monitor:
        for step in range(3 * STEPS):
            x, following, reward = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8)
            with torch.no_grad():
                wanted = reward + 0.99 * target(following).max(1).values
            loss = functional.smooth_l1_loss(online(x).gather(1, torch.randint(0, 2, (8, 1)))[:, 0], wanted)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_value_(online.parameters(), 100)
            optimizer.step()
            if step % 4 == 0:
                target.load_state_dict(online.state_dict())
    return monitor


def soft_actor_critic():
    actor, q1, q2 = mlp(4, 8, 4), mlp(6, 8, 1), mlp(6, 8, 1)
    t1, t2 = copy.deepcopy(q1), copy.deepcopy(q2)
    log_alpha = torch.zeros(1, requires_grad=True)
    q_optimizer = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=1e-3)
    actor_optimizer, a_optimizer = adam(actor), torch.optim.Adam([log_alpha], lr=1e-3)

    def act(x):
        mean, log_std = actor(x).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        action = normal.rsample()
        return action, normal.log_prob(action).sum(-1, keepdim=True)

    with watching({"actor": actor, "q1": q1, "q2": q2}, [q_optimizer, actor_optimizer, a_optimizer]) as monitor:
        for step in range(3 * STEPS):
            x = torch.randn(8, 4)
            with torch.no_grad():
                action, log_pi = act(torch.randn(8, 4))
                following = torch.cat([x, action], 1)
                wanted = torch.randn(8, 1) + 0.99 * (torch.min(t1(following), t2(following)) - log_alpha.exp() * log_pi)
            past = torch.cat([x, torch.randn(8, 2)], 1)
            q_optimizer.zero_grad()
            (functional.mse_loss(q1(past), wanted) + functional.mse_loss(q2(past), wanted)).backward()
            q_optimizer.step()
            if step % 2 == 0:  # delayed, and then twice
                for _ in range(2):
                    action, log_pi = act(x)
                    joint = torch.cat([x, action], 1)
                    actor_optimizer.zero_grad()
                    (log_alpha.exp().detach() * log_pi - torch.min(q1(joint), q2(joint))).mean().backward()
                    actor_optimizer.step()
                    with torch.no_grad():
                        _, log_pi = act(x)
                    a_optimizer.zero_grad()
                    (-log_alpha.exp() * (log_pi - 2)).mean().backward()
                    a_optimizer.step()
    return monitor


def twin_delayed_policy_gradient():
    actor, critic = mlp(4, 8, 2), mlp(6, 8, 1)
    actor_optimizer, critic_optimizer = adam(actor), adam(critic)
    with watching({"actor": actor, "critic": critic}, [actor_optimizer, critic_optimizer]) as monitor:
        for step in range(12):
            x = torch.randn(8, 4)
            critic_optimizer.zero_grad()
            functional.mse_loss(critic(torch.cat([x, torch.randn(8, 2)], 1)), torch.randn(8, 1)).backward()
            critic_optimizer.step()
            if step % 3 == 2:
                actor_optimizer.zero_grad()
                (-critic(torch.cat([x, actor(x)], 1)).mean()).backward()
                actor_optimizer.step()
    return monitor


def advantage_actor_critic_with_retained_graph():
    trunk = mlp(4, 8, 8)
    policy, value = nn.Linear(8, 2), nn.Linear(8, 1)
    model = nn.ModuleDict({"trunk": trunk, "policy": policy, "value": value})
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            h = trunk(torch.randn(8, 4))
            optimizer.zero_grad()
            policy(h).log_softmax(-1)[:, 0].mean().backward(retain_graph=True)
            value(h).square().mean().backward()
            clip_grad_norm_(model.parameters(), 40)
            optimizer.step()
    return monitor


# learning to learn, many gradients


def model_agnostic_meta_learning():
    model = mlp(3, 8, 1)
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            total = 0
            for _ in range(3):
                x, y = torch.randn(8, 3), torch.randn(8, 1)
                fast = dict(model.named_parameters())
                for _ in range(2):
                    inner = functional.mse_loss(functional_call(model, fast, (x,)), y)
                    gradients = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
                    fast = {name: value - 0.1 * g for (name, value), g in zip(fast.items(), gradients, strict=True)}
                total = total + functional.mse_loss(functional_call(model, fast, (torch.randn(8, 3),)), y)
            total.backward()
            optimizer.step()
    return monitor


def first_order_meta_learning_by_copies():
    model = mlp(3, 8, 1)
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            learner = copy.deepcopy(model)
            inner = torch.optim.SGD(learner.parameters(), lr=0.1)
            for _ in range(3):
                inner.zero_grad()
                functional.mse_loss(learner(torch.randn(8, 3)), torch.randn(8, 1)).backward()
                inner.step()
            optimizer.zero_grad()
            for parameter, moved in zip(model.parameters(), learner.parameters(), strict=True):
                parameter.grad = parameter.data - moved.data
            optimizer.step()
    return monitor


def architecture_search():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.ops, self.alphas = nn.ModuleList(nn.Linear(6, 3) for _ in range(3)), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return sum(w * op(x) for w, op in zip(self.alphas.softmax(0), self.ops, strict=True))

    model = Cell()
    weights = torch.optim.SGD(model.ops.parameters(), lr=0.1, momentum=0.9)
    architecture = torch.optim.Adam([model.alphas], lr=1e-2)
    with watching(model, [weights, architecture], clip=ClipByNorm(5.0)) as monitor:
        for _ in range(STEPS):
            architecture.zero_grad()
            loss_of(model).backward()
            architecture.step()
            weights.zero_grad()
            loss_of(model).backward()
            clip_grad_norm_(model.ops.parameters(), 5.0)
            weights.step()
    return monitor


def truncated_backpropagation_through_time():
    class Rnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x, state):
            out, state = self.cell(x, state)
            return self.head(out), state

    model, state = Rnn(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with watching(model, optimizer, clip=ClipByNorm(0.25)) as monitor:
        for _ in range(2 * STEPS):
            state = None if state is None else tuple(part.detach() for part in state)
            model.zero_grad()
            out, state = model(torch.randn(4, 7, 3), state)
            out.square().mean().backward()
            clip_grad_norm_(model.parameters(), 0.25)
            for group in optimizer.param_groups:
                group["lr"] *= 0.99
            optimizer.step()
    return monitor


def weights_updated_by_hand_without_an_optimizer():
    model = net()
    other = mlp(3, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with watching({"body": model, "other": other}, optimizer) as monitor:
        for _ in range(2 * STEPS):
            model.zero_grad()
            optimizer.zero_grad()
            other(model(torch.randn(8, 6))).mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.data.add_(parameter.grad.data, alpha=-0.25)
            optimizer.step()
    return monitor


def projected_gradients_of_several_tasks():
    model = net()
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            per_task = []
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                loss_of(model).backward(retain_graph=True)
                per_task.append([parameter.grad.clone() for parameter in model.parameters()])
            optimizer.zero_grad(set_to_none=True)
            for place, parameter in enumerate(model.parameters()):
                parameter.grad = per_task[0][place] + per_task[1][place]
            optimizer.step()
    return monitor


def virtual_adversarial_step_on_the_embedding():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.embedding(x).mean(1))

    model = Classifier()
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            x, y = torch.randint(0, 20, (8, 5)), torch.randint(0, 3, (8,))
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            weight = model.embedding.weight
            backup = weight.data.clone()
            weight.data.add_(weight.grad / weight.grad.norm())
            functional.cross_entropy(model(x), y).backward()  # adds the adversarial gradient
            weight.data = backup
            optimizer.step()
    return monitor


def adversarial_training_by_projected_gradients():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
            delta = torch.zeros_like(x, requires_grad=True)
            for _ in range(3):
                functional.cross_entropy(model(x + delta), y).backward()  # into the weights as well
                delta.data = (delta + 0.1 * delta.grad.detach().sign()).clamp(-0.3, 0.3)
                delta.grad.zero_()
            optimizer.zero_grad()
            functional.cross_entropy(model(x + delta.detach()), y).backward()
            optimizer.step()
    return monitor


# optimizers of other kinds


class SharpnessAware(torch.optim.Optimizer):
    """The wrapper that most repositories copy: a base optimizer inside, two steps outside."""

    def __init__(self, parameters, base, rho=0.05, **more):
        super().__init__(parameters, {"rho": rho, **more})
        self.base_optimizer = base(self.param_groups, **more)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        held = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        norm = torch.stack([parameter.grad.norm() for parameter in held]).norm()
        for parameter in held:
            self.state[parameter]["old"] = parameter.data.clone()
            parameter.add_(parameter.grad * 0.05 / (norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = self.state[parameter]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


def sharpness_aware_by_two_calls():
    model = net()
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.1)
    with watching(model, optimizer.base_optimizer) as monitor:
        for _ in range(STEPS):
            loss_of(model).backward()
            optimizer.first_step()
            loss_of(model).backward()
            optimizer.second_step()
    return monitor


def sharpness_aware_by_closure():
    model = net()
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.1)
    with watching(model, optimizer, accumulate=2) as monitor:
        for _ in range(STEPS):
            loss_of(model).backward()
            optimizer.step(lambda: loss_of(model).backward())
    return monitor


class Lookahead(torch.optim.SGD):
    """Every k-th step goes half of the way back."""

    def __init__(self, parameters, **more):
        super().__init__(parameters, **more)
        self.calls = 0
        self.slow = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]

    def step(self, closure=None):
        result = super().step(closure)
        self.calls += 1
        if self.calls % 3 == 0:
            held = [parameter for group in self.param_groups for parameter in group["params"]]
            for slow, parameter in zip(self.slow, held, strict=True):
                slow.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(slow)
        return result


def lookahead():
    model = net()
    optimizer = Lookahead(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for _ in range(2 * STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert len(monitor.records) == 2 * STEPS
    return monitor


def averaged_weights():
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            average.update_parameters(model)
            schedule.step()
    return monitor


@pytest.mark.parametrize("registered", ["before", "after"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_stepping_inside_the_backward_pass_is_silent(registered, accumulate):
    model = net()
    optimizers = {parameter: torch.optim.Adam([parameter]) for parameter in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    def register():
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    if registered == "before":
        register()
    with watching(model, list(optimizers.values()), accumulate=accumulate) as monitor:
        if registered == "after":
            register()
        for _ in range(STEPS):
            loss_of(model).backward()
    assert found(monitor) == []
    assert len(monitor.records) == STEPS * len(optimizers)


def several_optimizers_of_one_model_stepped_together():
    model = net()
    optimizers = [torch.optim.SGD(model[:3].parameters(), lr=0.1), torch.optim.AdamW(model[3:].parameters())]
    with watching(model, optimizers) as monitor:
        for _ in range(STEPS):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model).backward()
            for optimizer in optimizers:
                optimizer.step()
    return monitor


def lbfgs_that_converges():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    x = torch.randn(16, 3)
    y = x @ torch.tensor([[1.0], [2.0], [3.0]])

    def closure():
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with watching(model, optimizer) as monitor:
        for _ in range(3 * STEPS):
            optimizer.step(closure)
    return monitor


# other habits


def two_time_scales():
    fast, slow = mlp(6, 8, 3), mlp(6, 8, 3)
    fast_optimizer, slow_optimizer = (
        torch.optim.SGD(fast.parameters(), lr=0.1),
        torch.optim.SGD(slow.parameters(), lr=0.1),
    )
    with watching({"fast": fast, "slow": slow}, [fast_optimizer, slow_optimizer]) as monitor:
        for step in range(16):
            fast_optimizer.zero_grad()
            x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
            functional.cross_entropy(fast(x) + slow(x), y).backward()
            fast_optimizer.step()
            if step % 4 == 3:  # has summed four gradients
                slow_optimizer.step()
                slow_optimizer.zero_grad()
    return monitor


def skip_when_the_loss_is_not_a_number():
    model = net()
    optimizer = adam(model)
    with watching(model, optimizer, accumulate=2) as monitor:
        for batch in range(12):
            loss = loss_of(model) * (math.nan if batch == 5 else 1)
            if not torch.isfinite(loss):
                optimizer.zero_grad()
                continue
            loss.backward()
            if batch % 2:
                optimizer.step()
                optimizer.zero_grad()
    return monitor


def skip_when_the_gradient_norm_is_not_finite():
    model = net()
    optimizer = adam(model)
    with watching(model, optimizer, accumulate=2) as monitor:
        for step in range(STEPS):
            for _ in range(2):
                (loss_of(model) * (math.inf if step == 2 else 1)).backward()
            if math.isfinite(clip_grad_norm_(model.parameters(), 1e6)):
                optimizer.step()
            optimizer.zero_grad()
    return monitor


def progressive_freezing_and_unfreezing():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for step in range(12):
            model[0].requires_grad_(step % 4 < 2)
            model[2].requires_grad_(step > 5)
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    return monitor


def folds_with_an_optimizer_each():
    for _ in range(3):
        model = net()
        optimizer = adam(model)
        with watching(model, optimizer) as monitor:
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
    return monitor


def a_notebook_cell_run_again():
    model = net()
    for _ in range(3):
        optimizer = adam(model)
        monitor = watch(model, optimizer, sinks=[], on_diagnosis="record", on_violation="raise")
        for _ in range(STEPS):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    monitor.close()
    return monitor


def a_run_that_goes_on_from_a_checkpoint():
    model = net()
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for step in range(2 * STEPS):
            if step == STEPS:
                state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    return monitor


def evaluation_with_gradients_between_epochs():
    model = net()
    optimizer = adam(model)
    with watching(model, optimizer, accumulate=2) as monitor:
        for _ in range(3):
            model.train()
            optimizer.zero_grad()
            for batch in range(4):
                loss_of(model).backward()
                if batch % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            model.eval()
            loss_of(model).backward()  # a saliency map, say
    return monitor


def gradient_noise_and_normalisation_by_hand():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, clip=ClipByNorm(1.0)) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
            for parameter in model.parameters():
                parameter.grad = parameter.grad / norm + 1e-5 * torch.randn_like(parameter)
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return monitor


def gradient_checkpointing():
    for reentrant in (True, False):
        model = net()
        optimizer = adam(model)
        with watching(model, optimizer, accumulate=2) as monitor:
            for _ in range(STEPS):
                optimizer.zero_grad()
                for _ in range(2):
                    x = torch.randn(8, 6, requires_grad=True)
                    h = checkpoint(model[:2], x, use_reentrant=reentrant)
                    out = checkpoint(model[2:], h, use_reentrant=reentrant)
                    functional.cross_entropy(out, torch.randint(0, 3, (8,))).backward()
                optimizer.step()
        assert found(monitor) == []
    return monitor


def a_compiled_model_and_a_compiled_step():
    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        model = net()
        optimizer = adam(model)
        with watching(model, optimizer) as monitor:
            compiled, step = torch.compile(model, backend=backend), torch.compile(optimizer.step, backend=backend)
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss_of(compiled).backward()
                step()
        assert found(monitor) == []
        assert len(monitor.records) == STEPS
    return monitor


def a_model_with_lazy_and_parametrised_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))
    model[2] = nn.utils.parametrizations.spectral_norm(model[2])
    optimizer = adam(model)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    return monitor


def a_pretrained_trunk_under_a_new_head():
    model = net()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model[4] = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    return monitor


def a_penalty_over_all_parameters_and_a_gradient_logger():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            (loss_of(model) + 1e-4 * parameters_to_vector(model.parameters()).square().sum()).backward()
            assert sum(parameter.grad.norm().item() for parameter in model.parameters()) > 0
            optimizer.step()
    return monitor


SILENT = [
    dcgan,
    dcgan_in_declared_windows,
    dcgan_in_declared_windows_zeroed_in_place,
    wasserstein_gan_with_gradient_penalty,
    wasserstein_gan_with_weight_clipping,
    pix2pix,
    cyclegan,
    diffusion_with_exponential_average,
    variational_autoencoder,
    radiance_field_with_two_networks_and_one_optimizer,
    nano_gpt,
    transformers_style_accumulation_with_a_short_last_window,
    timm_second_order,
    detection_with_a_dictionary_of_losses,
    self_distillation_with_a_momentum_teacher,
    siamese,
    byol_with_its_target_inside,
    graph_network_on_the_whole_graph,
    mixture_of_experts,
    proximal_policy_optimisation,
    deep_q_network,
    soft_actor_critic,
    twin_delayed_policy_gradient,
    advantage_actor_critic_with_retained_graph,
    model_agnostic_meta_learning,
    first_order_meta_learning_by_copies,
    architecture_search,
    truncated_backpropagation_through_time,
    weights_updated_by_hand_without_an_optimizer,
    projected_gradients_of_several_tasks,
    virtual_adversarial_step_on_the_embedding,
    adversarial_training_by_projected_gradients,
    sharpness_aware_by_two_calls,
    sharpness_aware_by_closure,
    lookahead,
    averaged_weights,
    several_optimizers_of_one_model_stepped_together,
    lbfgs_that_converges,
    two_time_scales,
    skip_when_the_loss_is_not_a_number,
    skip_when_the_gradient_norm_is_not_finite,
    progressive_freezing_and_unfreezing,
    folds_with_an_optimizer_each,
    a_notebook_cell_run_again,
    a_run_that_goes_on_from_a_checkpoint,
    evaluation_with_gradients_between_epochs,
    gradient_noise_and_normalisation_by_hand,
    gradient_checkpointing,
    pytest.param(a_compiled_model_and_a_compiled_step, marks=pytest.mark.slow),
    a_model_with_lazy_and_parametrised_weights,
    a_pretrained_trunk_under_a_new_head,
    a_penalty_over_all_parameters_and_a_gradient_logger,
]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("loop", SILENT, ids=lambda loop: loop.__name__)
def test_a_lawful_loop_is_silent(loop):
    monitor = loop()
    assert found(monitor) == []
    assert monitor.records
