/* The explorer: choices -> rows of a table -> points or curves with their intervals, the numbers, the pictures. */
(function () {
  'use strict';
  var data = window.RESULTS, home = document.getElementById('explorer');
  if (!data || !home) return;
  var part = {};
  home.querySelectorAll('[data-part]').forEach(function (e) { part[e.dataset.part] = e; });
  if (!data.tables.length) { part.note.textContent = 'No tables of results have been made yet.'; return; }

  var state = { table: '', metric: '', x: '', seed: '', fixed: {}, who: null, places: null };
  var table, cell; // the table chosen; column name -> index

  function word(w) { return data.words[w] || w; }
  function each(list, f) { Array.prototype.forEach.call(list, f); }
  function unique(list) { return list.filter(function (v, i) { return list.indexOf(v) === i; }); }
  function values(column) { return unique(table.rows.map(function (r) { return r[cell[column]]; })); }
  function colour(who, k) { return data.colours[who] || data.muted[k % data.muted.length]; }
  function is_curve() { return table.along.indexOf(state.x) >= 0; }
  function share() { return table.share.indexOf(state.metric) >= 0; }
  function make(tag, text, parent) {
    var e = document.createElement(tag);
    if (text !== undefined) e.textContent = text;
    if (parent) parent.appendChild(e);
    return e;
  }

  /* ---------------------------------------------------------------- choices */

  function open(name) {
    table = data.tables.filter(function (t) { return t.name === name; })[0] || data.tables[0];
    cell = {};
    table.columns.concat(['value', 'low', 'high', 'n']).forEach(function (c, i) { cell[c] = i; });
    state.table = table.name;
    var axes = table.along.concat(table.others), metrics = values('metric');
    if (metrics.indexOf(state.metric) < 0) state.metric = metrics.filter(certain)[0] || metrics[0];
    if (axes.indexOf(state.x) < 0) state.x = axes[0] || '';
    settle();
  }

  function certain(metric) { // has intervals
    return table.rows.some(function (r) { return r[1] === metric && r[cell.low] !== null; });
  }

  function settle() { // what the choices leave open gets a value that is there
    state.fixed = table.along.concat(table.others).filter(function (k) { return k !== state.x; }).reduce(function (all, k) {
      var known = values(k);
      all[k] = known.indexOf(state.fixed[k]) >= 0 ? state.fixed[k] : known[0];
      return all;
    }, {});
    if (table.seed && values('seed').indexOf(state.seed) < 0) state.seed = values('seed').indexOf('all') >= 0 ? 'all' : values('seed')[0];
    var known = values(table.who);
    state.who = (state.who || data.first).filter(function (w) { return known.indexOf(w) >= 0; });
    if (!state.who.length) state.who = state.x ? known.slice(0, 8) : known;
    var there = state.x && !is_curve() ? values(state.x) : [];
    state.places = (state.places || there).filter(function (p) { return there.indexOf(p) >= 0; });
    if (!state.places.length) state.places = there;
  }

  function select(label, options, chosen, change) {
    var l = make('label', label, part.choices), s = make('select', undefined, l);
    options.forEach(function (o) {
      var e = make('option', word(o), s);
      e.value = o;
      e.selected = o === chosen;
    });
    s.addEventListener('change', function () { change(s.value); show(); });
  }

  function chips(field, legend, options, chosen, tinted, change) {
    field.hidden = options.length < 2;
    while (field.children.length > 1) field.removeChild(field.lastChild);
    field.firstElementChild.textContent = legend;
    options.forEach(function (o, k) {
      var l = make('label', undefined, field), box = make('input', undefined, l);
      box.type = 'checkbox';
      box.checked = chosen.indexOf(o) >= 0;
      l.appendChild(document.createTextNode(word(o)));
      if (tinted) l.style.setProperty('--chip', colour(o, k) + '55');
      box.addEventListener('change', function () {
        change(options.filter(function (p) { return p === o ? box.checked : chosen.indexOf(p) >= 0; }));
        show();
      });
    });
    [['all', options], ['none', []]].forEach(function (b) {
      var e = make('button', b[0], field);
      e.type = 'button';
      e.addEventListener('click', function () { change(b[1]); show(); });
    });
  }

  function choices() {
    part.choices.textContent = '';
    select('table', data.tables.map(function (t) { return t.name; }), state.table, function (v) { state.places = null; open(v); });
    if (values('metric').length > 1) select('number', values('metric'), state.metric, function (v) { state.metric = v; });
    var axes = table.along.concat(table.others);
    if (axes.length > 1) select('along', axes, state.x, function (v) { state.x = v; state.places = null; settle(); });
    Object.keys(state.fixed).forEach(function (k) {
      select(k, values(k), state.fixed[k], function (v) { state.fixed[k] = v; });
    });
    if (table.seed) select('models', values('seed'), state.seed, function (v) { state.seed = v; });
    chips(part.who, table.who, values(table.who), state.who, true, function (v) { state.who = v; });
    chips(part.places, state.x, state.places && state.x && !is_curve() ? values(state.x) : [], state.places, false,
          function (v) { state.places = v; });
  }

  /* ---------------------------------------------------------------- the rows that are chosen */

  function rows(who) {
    var chosen = table.rows.filter(function (r) {
      if (r[0] !== who || r[1] !== state.metric || (table.seed && r[cell.seed] !== state.seed)) return false;
      if (state.x && !is_curve() && state.places.indexOf(r[cell[state.x]]) < 0) return false;
      return Object.keys(state.fixed).every(function (k) { return r[cell[k]] === state.fixed[k]; });
    });
    var order = state.x && !is_curve() ? values(state.x) : [];
    return chosen.sort(function (a, b) {
      if (!state.x) return 0;
      a = a[cell[state.x]];
      b = b[cell[state.x]];
      return is_curve() ? a - b : order.indexOf(a) - order.indexOf(b);
    });
  }

  function number(v) { return v === null ? null : share() ? 100 * v : v; }
  function pick(list, column) { return list.map(function (r) { return number(r[cell[column]]); }); }
  function round(v) { return v === null ? '' : share() ? v.toFixed(1) : String(+v.toPrecision(4)); }

  /* ---------------------------------------------------------------- the chart */

  function css(name, otherwise) { return getComputedStyle(document.body).getPropertyValue(name).trim() || otherwise; }

  function points(who, k, narrow) {
    var comma = narrow ? ',<br>' : ', ', r = rows(who), y = pick(r, 'value'), low = pick(r, 'low'), high = pick(r, 'high'), c = colour(who, k);
    var x = r.map(function (q) { return (state.x ? word(q[cell[state.x]]) : who).replace(', ', comma); });
    return [{
      type: 'scatter', mode: 'markers', name: who, x: x, y: y, offsetgroup: who, marker: { color: c, size: 9 },
      error_y: {
        type: 'data', symmetric: false, color: c, thickness: 1.6, width: 3,
        array: y.map(function (v, i) { return high[i] === null ? 0 : high[i] - v; }),
        arrayminus: y.map(function (v, i) { return low[i] === null ? 0 : v - low[i]; })
      },
      customdata: r.map(function (q) { return interval(q); }), hovertemplate: '%{x}<br>' + who + ': %{customdata}<extra></extra>'
    }];
  }

  function curve(who, k) {
    var r = rows(who), c = colour(who, k), x = r.map(function (q) { return +q[cell[state.x]]; });
    var band = r.filter(function (q) { return q[cell.low] !== null; }), bx = band.map(function (q) { return +q[cell[state.x]]; });
    return [
      { type: 'scatter', mode: 'lines', x: bx.concat(bx.slice().reverse()), y: pick(band, 'high').concat(pick(band, 'low').reverse()),
        fill: 'toself', fillcolor: c + '26', line: { width: 0 }, hoverinfo: 'skip', showlegend: false, legendgroup: who },
      { type: 'scatter', mode: 'lines+markers', name: who, legendgroup: who, x: x, y: pick(r, 'value'), line: { color: c, width: 2.2 },
        marker: { size: 5 }, customdata: r.map(interval), hovertemplate: state.x + ' %{x}<br>' + who + ': %{customdata}<extra></extra>' }
    ];
  }

  function interval(r) {
    var unit = share() ? '%' : '', text = round(number(r[cell.value])) + unit;
    if (r[cell.low] !== null) text += ' (' + round(number(r[cell.low])) + ' to ' + round(number(r[cell.high])) + ')';
    return r[cell.n] !== null ? text + ', n ' + r[cell.n] : text;
  }

  function ends(traces, span) { // curves are labelled where they end, labels kept apart and within the chart
    var at = traces.filter(function (t) { return t.name && t.x.length; }).map(function (t) {
      return { name: t.name, color: t.line.color, x: t.x[t.x.length - 1], y: t.y[t.y.length - 1] };
    }).sort(function (a, b) { return a.y - b.y; }), gap = span / 22, last = -Infinity;
    at.forEach(function (a) { last = a.y = Math.max(a.y, last + gap); });
    var ceiling = share() ? 101 : Infinity;
    at.slice().reverse().forEach(function (a) {
      a.y = Math.min(a.y, ceiling);
      ceiling = a.y - gap;
    });
    return at.map(function (a) {
      return { text: a.name, x: a.x, y: a.y, xanchor: 'left', xshift: 8, showarrow: false, font: { color: a.color, size: 12 } };
    });
  }

  function draw() {
    var narrow = part.chart.clientWidth < 560, known = values(table.who), traces = [];
    state.who.forEach(function (w) { traces = traces.concat((is_curve() ? curve : points)(w, known.indexOf(w), narrow)); });
    var y = [].concat.apply([], traces.map(function (t) { return t.y; })).filter(function (v) { return v !== null; });
    var span = share() ? 100 : Math.max.apply(null, y) - Math.min.apply(null, y) || 1;
    var ink = css('--color-foreground-primary', '#222'), grid = css('--color-background-border', '#ddd');
    var labels = is_curve() && !narrow ? ends(traces, span) : [];
    var axis = { gridcolor: grid, zerolinecolor: grid, automargin: true, fixedrange: narrow };
    Plotly.react(part.chart, traces, {
      scattermode: is_curve() || !state.x ? 'overlay' : 'group', scattergap: .25, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
      font: { color: ink, family: 'system-ui, sans-serif', size: narrow ? 11 : 13 },
      margin: { l: narrow ? 44 : 60, r: labels.length ? 150 : 10, t: 44, b: 40 }, annotations: labels,
      title: { text: word(state.metric) + (share() ? ', %' : ''), x: 0, xref: 'paper', xanchor: 'left', font: { size: narrow ? 13 : 15 } },
      showlegend: !labels.length && !!state.x && state.who.length > 1,
      legend: { orientation: 'h', y: narrow ? -.18 : -.12, yanchor: 'top', x: 0 },
      xaxis: Object.assign({}, axis, { title: { text: is_curve() ? state.x : '' }, type: is_curve() ? 'linear' : 'category' }),
      yaxis: Object.assign({}, axis, { rangemode: share() ? 'tozero' : 'normal' }, share() ? { range: [-2, Math.max(20, Math.min(102, top(traces) * 1.06))] } : {})
    }, { displaylogo: false, responsive: true, displayModeBar: false });
  }

  function top(traces) {
    return Math.max.apply(null, [0].concat([].concat.apply([], traces.map(function (t) {
      return t.y.map(function (v, i) { return v + (t.error_y ? t.error_y.array[i] : 0); });
    }))));
  }

  function numbers() {
    part.numbers.textContent = '';
    var t = make('table', undefined, part.numbers), head = make('tr', undefined, make('thead', undefined, t)), body = make('tbody', undefined, t);
    (state.x ? [table.who, state.x] : [table.who]).concat([word(state.metric) + (share() ? ', %' : ''), 'low', 'high', 'n']).forEach(function (h) {
      make('th', h, head);
    });
    t.className = 'sortable';
    state.who.forEach(function (w) {
      rows(w).forEach(function (r) {
        var line = make('tr', undefined, body);
        (state.x ? [w, word(r[cell[state.x]])] : [w]).concat(
          ['value', 'low', 'high'].map(function (c) { return round(number(r[cell[c]])); }), [r[cell.n] === null ? '' : r[cell.n]]
        ).forEach(function (v) { make('td', v, line); });
      });
    });
    return body.rows.length;
  }

  /* ---------------------------------------------------------------- the pictures */

  function pictures() {
    var shown = state.who.filter(function (w) { return data.pictures[w]; });
    part.pictures.textContent = '';
    part['pictures-title'].hidden = !shown.length;
    shown.forEach(function (w) {
      var seeds = data.pictures[w], seed = seeds[state.seed] ? state.seed : Object.keys(seeds)[0];
      var figure = make('figure', undefined, part.pictures), image = document.createElement('img');
      make('figcaption', w + ', model ' + seed + ' (' + seeds[seed].from + ')', figure);
      image.src = seeds[seed].src;
      image.alt = 'Pictures that ' + w + ' draws, before and after fine-tuning';
      image.loading = 'lazy';
      image.addEventListener('click', function () { figure.classList.toggle('large'); });
      figure.appendChild(image);
    });
  }

  /* ---------------------------------------------------------------- together; the address keeps the choice */

  function show() {
    choices();
    draw();
    var n = numbers();
    part.note.textContent = (n ? '' : 'There are no numbers for this choice. ') + 'From results/tables/' + table.name + '.csv. ' +
      (is_curve() ? 'Bands' : 'Bars') + ' are 95% intervals' + (state.seed === 'all' && table.seed ? ' over all models' : '') +
      ', where the table has them; hover or tap for figures.';
    pictures();
    try { history.replaceState(null, '', '#' + encodeURIComponent(JSON.stringify(state))); } catch (e) { /* a frame may refuse */ }
  }

  try { Object.assign(state, JSON.parse(decodeURIComponent(location.hash.slice(1)))); } catch (e) { /* no choice in the address */ }
  open(state.table);
  show();
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ['data-theme'] });
  if (window.matchMedia) window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
})();
