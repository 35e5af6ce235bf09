"""Everything about the package stands in settings.ini; this reads it."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser()
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
      author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
      packages=find_packages(include=['resalign', 'resalign.*']),
      python_requires=f">={cfg['min_python']}",
      install_requires=cfg['requirements'].split(),
      extras_require={'dev': cfg['dev_requirements'].split()},
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['resalign=resalign._modidx:d']})
