"What each method's name runs, which settings contradict it, and that every switch of the ledger has its test."
import csv
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from resalign.baselines import (advunlearn, ca, eraseflow, esd, lcfdsd, meta_unlearning, methods, modular_lora,
                                other_losses, parts, pgu, safegen, salun, speed, stereo, uce)
from resalign.baselines.methods import METHODS, config_of, run_method
from resalign.baselines.resalign_plus import EncoderConfig, ResAlignPlusConfig, align_encoder, resalign_plus
from resalign.core.settings import Config, UserError
from resalign.method.resalign import Method, ResAlignConfig, resalign
from tests.fast import toys

ROOT = Path(__file__).resolve().parents[2]

RUNS = {
    'original': (parts.original, Config), 'ga': (resalign, ResAlignConfig), 'resalign': (resalign, ResAlignConfig),
    'resalign-first-order': (resalign, ResAlignConfig), 'resalign-plus': (resalign_plus, ResAlignPlusConfig),
    'text-encoder': (align_encoder, EncoderConfig),
    'esd-retain': (other_losses.resalign_esd, other_losses.ResAlignESDConfig),
    'resalign-esd': (other_losses.resalign_esd, other_losses.ResAlignESDConfig),
    'ca-retain': (other_losses.resalign_ca, other_losses.ResAlignCAConfig),
    'resalign-ca': (other_losses.resalign_ca, other_losses.ResAlignCAConfig), 'esd-x': (esd.esd, esd.ESDConfig),
    'esd-u': (esd.esd, esd.ESDConfig), 'ca': (ca.ca, ca.CAConfig), 'safegen': (safegen.safegen, safegen.SafeGenConfig),
    'advunlearn': (advunlearn.advunlearn, advunlearn.AdvUnlearnConfig),
    'lcfdsd-ng': (lcfdsd.lcfdsd, lcfdsd.LCFDSDConfig),
    'lcfdsd-lt': (lcfdsd.lcfdsd, lcfdsd.LCFDSDConfig), 'uce': (uce.uce, uce.UCEConfig),
    'rece': (uce.rece, uce.RECEConfig),
    'salun': (salun.salun, salun.SalUnConfig), 'modular-lora': (modular_lora.modular_lora, ResAlignConfig),
    'pgu': (pgu.pgu, pgu.PGUConfig),
    'meta-unlearning-esd': (meta_unlearning.meta_unlearning, meta_unlearning.MetaUnlearningConfig),
    'meta-unlearning-sdd': (meta_unlearning.meta_unlearning, meta_unlearning.MetaUnlearningConfig),
    'meta-unlearning-released': (meta_unlearning.meta_unlearning, meta_unlearning.ReleasedConfig),
    'speed': (speed.speed, speed.SPEEDConfig), 'stereo': (stereo.stereo, stereo.StereoConfig),
    'eraseflow': (eraseflow.eraseflow, eraseflow.EraseFlowConfig)}

SAYS = { # what a name decides, and a setting that contradicts it
    'ga': ('beta', 0., .5), 'esd-retain': ('beta', 0., .5), 'ca-retain': ('beta', 0., .5),
    'modular-lora': ('beta', 0., .5),
    'resalign-first-order': ('solver', 'identity', 'cg'), 'esd-x': ('variant', 'x', 'u'),
    'esd-u': ('variant', 'u', 'x'),
    'lcfdsd-ng': ('variant', 'ng', 'lt'), 'lcfdsd-lt': ('variant', 'lt', 'ng'),
    'meta-unlearning-esd': ('base', 'esd', 'sdd'),
    'meta-unlearning-sdd': ('base', 'sdd', 'esd'), 'meta-unlearning-released': ('base', 'esd', 'sdd')}


def test_names():
    "What each one runs, decides and refuses"
    # what each name runs
    assert {name: (method.run, method.config) for name, method in METHODS.items()} == RUNS

    # what each name decides and refuses
    fixed = {name: method.fixed for name, method in METHODS.items() if method.fixed}
    assert fixed == {method: {field: value} for method, (field, value, _) in SAYS.items()}
    for method, (field, value, other) in SAYS.items():
        assert getattr(config_of(method, {}), field) == getattr(config_of(method, {field: value}), field) == value
        with pytest.raises(UserError, match=f'unlearn.{method}: {field}: .*{value!r}.*{other!r}'):
            config_of(method, {field: other})

    # resilience needs a weight
    for method in 'resalign', 'resalign-first-order', 'resalign-plus', 'resalign-esd', 'resalign-ca':
        assert config_of(method, dict(beta=.5)).beta == .5 and config_of(method, {}).beta == .8
        for beta in 0., -.5:
            with pytest.raises(UserError, match=f'unlearn.{method}: beta: .*{beta}'):
                config_of(method, dict(beta=beta))


def test_settings():
    # settings are checked and the seed is set
    for name, method in METHODS.items():
        config = config_of(name, {}, 7)
        assert type(config) is method.config and getattr(config, 'seed', 7) == 7
        assert getattr(config_of(name, {}), 'seed', 0) == 0
    assert config_of('esd-x', dict(eta=3., seed=2), 7) == esd.ESDConfig(eta=3., seed=7)
    with pytest.raises(UserError, match='unlearn.ca: wieght'): config_of('ca', dict(wieght=1.))
    with pytest.raises(UserError, match="method.*'esdx'"): config_of('esdx', {})

    # the settings of params yaml hold
    params = yaml.safe_load((ROOT/'params.yaml').read_text(encoding='utf-8'))
    sections = params['methods']
    assert set(sections) == set(METHODS)
    for method, section in sections.items():
        assert section['trials'] and section.get('chosen', section['trials'][0]) in section['trials'], method
        for settings in section['trials']:
            config_of(method, section['start'] | settings)
    headline = params['table']['headline']
    assert set(headline) < set(METHODS) and headline[0] == 'original'
    assert len({len(sections[method]['trials']) for method in headline[1:]}) == 1 # as many for each


def test_what_a_method_needs():
    # methods that need the words to erase say so
    pipe, data = toys.given()
    data.erase = ()
    for method in ('ca', 'salun', 'uce', 'rece', 'meta-unlearning-esd', 'resalign-ca', 'speed', 'stereo', 'eraseflow'):
        with pytest.raises(UserError, match=f'{method[:15]}: expected `erase`'): run_method(pipe, data, method, {})

    # methods that need benign captions say so
    pipe, data = toys.given()
    data.retain_captions = ()
    for method in 'uce', 'rece', 'advunlearn', 'speed':
        with pytest.raises(UserError, match=f'{method}: .*retain_captions'): run_method(pipe, data, method, {})


def test_a_method_is_run_with_its_settings_and_what_else_is_given(monkeypatch):
    pipe, calls = SimpleNamespace(unet=None), []
    def record(*args, **kw):
        calls.append((args, kw))
        return 'log'
    monkeypatch.setitem(METHODS, 'esd-u', Method(record, esd.ESDConfig, 'ESD-u', dict(variant='u')))
    assert run_method(pipe, 'data', 'esd-u', dict(eta=2.), 3, checkpoint='here', save_adapter='there') == 'log'
    assert run_method(pipe, 'data', 'esd-u', {}) == 'log'
    assert calls == [((pipe, 'data', esd.ESDConfig(variant='u', eta=2., seed=3)),
                      dict(checkpoint='here', save_adapter='there')),
                     ((pipe, 'data', esd.ESDConfig(variant='u', seed=0)), {})]


def test_what_a_transformer_is_for(monkeypatch):
    "A method takes it as it is, as a UNet, by the map that reads captions, or not at all, which one line says"
    pipe = SimpleNamespace(transformer=SimpleNamespace(context_embedder=None), text_encoder='own')
    assert run_method(pipe, None, 'original', {}) == dict(log=[], solves=[])
    refused = set()
    for method in METHODS:
        try: taken = methods.for_method(pipe, method)
        except UserError as e:
            assert str(e).startswith(f'{method}: not defined on a rectified-flow transformer (SD3, FLUX): it')
            refused.add(method)
            continue
        if taken is pipe: continue
        assert taken.text_encoder == 'own' and (taken.unet is pipe.transformer) == (method not in methods.TEXT_MAPS)
    assert set(methods.NO_FLOW) == refused & set(methods.NO_FLOW)
    with pytest.raises(UserError, match='two tokenizers share a sequence'):
        methods.for_method(SimpleNamespace(transformer=None, text_encoder_3='T5'), 'uce')


with open(ROOT/'nbs/5_baselines/deviations.csv', newline='', encoding='utf-8') as f: LEDGER = list(csv.DictReader(f))


def test_the_ledger():
    # the ledger names methods and switches
    ours = {'original', 'resalign', 'resalign-first-order', 'resalign-plus', 'text-encoder', 'esd-retain', 'resalign-esd',
            'ca-retain', 'resalign-ca'}
    assert {r['method'] for r in LEDGER} >= set(METHODS) - ours
    for r in LEDGER:
        assert r['what'] and r['here'] and r['method'] in METHODS, r
        assert not r['switch'] or r['switch'] in METHODS[r['method']].config.model_fields, r

    # every switch of the ledger is tested for what it says
    tested = set()
    for file in Path(__file__).parent.glob('test_*.py'):
        if 'ledger' not in file.read_text(encoding='utf-8'): continue
        module = importlib.import_module(f'tests.fast.{file.stem}')
        tested |= set().union(*(getattr(v, 'ledger', ()) for k, v in vars(module).items() if k.startswith('test_')))
    switches = {f"{r['method']}/{r['switch']}" for r in LEDGER if r['switch']}
    assert switches - tested == set() and tested - switches == set()


