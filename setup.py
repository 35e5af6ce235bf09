"""Everything about the package stands in settings.ini; this reads it, and puts params.yaml beside the modules."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
ini = ConfigParser()
ini.read(HERE/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


class WithDefaults(build_py):
    "Defaults of methods and profiles travel with the package; params.yaml of a clone comes before them"
    def run(self):
        super().run()
        shutil.copy(HERE/'params.yaml', Path(self.build_lib)/'resalign')


setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
      author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
      long_description=(HERE/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      packages=find_packages(include=['resalign', 'resalign.*']), cmdclass={'build_py': WithDefaults},
      python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
      extras_require={'dev': cfg['dev_requirements'].split()},
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['resalign=resalign._modidx:d']})
