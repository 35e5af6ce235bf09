/* Tables: a click on a heading sorts; a box above filters. Wide ones scroll inside a frame of their own. */
(function () {
  'use strict';
  var SHORTEST = 3; // rows below which nothing needs sorting
  var SHORT = 20; // letters that are kept on one line

  function value(row, column) {
    var cell = row.cells[column];
    return cell ? cell.textContent.trim() : '';
  }

  function compare(a, b) {
    var x = parseFloat(a.replace(/,/g, '')), y = parseFloat(b.replace(/,/g, ''));
    if (a === '' || b === '') return (a === '') - (b === ''); // nothing comes last
    if (!isNaN(x) && !isNaN(y) && x !== y) return x - y;
    return a.localeCompare(b, 'en', { numeric: true });
  }

  function sort(table, head, column) {
    var down = head.getAttribute('aria-sort') === 'ascending', body = table.tBodies[0];
    var rows = Array.prototype.slice.call(body.rows);
    rows.sort(function (a, b) {
      var order = compare(value(a, column), value(b, column));
      return down && value(a, column) !== '' && value(b, column) !== '' ? -order : order;
    });
    rows.forEach(function (row) { body.appendChild(row); });
    Array.prototype.forEach.call(head.parentNode.cells, function (h) { h.removeAttribute('aria-sort'); });
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  }

  function sortable(table) {
    var heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
    Array.prototype.forEach.call(heads, function (head, column) {
      head.classList.add('sorts');
      head.tabIndex = 0;
      head.addEventListener('click', function () { sort(table, head, column); });
      head.addEventListener('keydown', function (e) {
        if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); sort(table, head, column); }
      });
    });
  }

  function framed(table) {
    var frame = document.createElement('div');
    frame.className = 'wide-table';
    frame.tabIndex = 0;
    table.parentNode.insertBefore(frame, table);
    frame.appendChild(table);
    return frame;
  }

  function filtered(table, frame) {
    var box = document.createElement('div'), input = document.createElement('input'), said = document.createElement('span');
    box.className = 'filter';
    input.type = 'search';
    input.placeholder = 'Filter rows';
    input.setAttribute('aria-label', 'Filter rows');
    function show() {
      var words = input.value.toLowerCase().split(/\s+/).filter(Boolean), rows = table.tBodies[0].rows, n = 0;
      Array.prototype.forEach.call(rows, function (row) {
        var text = row.textContent.toLowerCase();
        row.hidden = !words.every(function (w) { return text.indexOf(w) >= 0; });
        n += !row.hidden;
      });
      said.textContent = n + ' of ' + rows.length + ' rows';
    }
    input.addEventListener('input', show);
    box.appendChild(input);
    box.appendChild(said);
    frame.parentNode.insertBefore(box, frame);
    show();
  }

  document.querySelectorAll('article table').forEach(function (table) {
    if (table.closest('.wide-table, .highlighttable')) return;
    var plain = table.tHead && table.tBodies.length === 1 && table.tHead.rows.length === 1;
    var frame = framed(table);
    table.querySelectorAll('td').forEach(function (cell) { // numbers with their intervals stay on a line
      if (cell.textContent.trim().length <= SHORT) cell.classList.add('short');
    });
    if (plain && table.tBodies[0].rows.length >= SHORTEST) sortable(table);
    if (table.classList.contains('filtered')) {
      document.body.classList.add('whole');
      filtered(table, frame);
    }
  });
  if (document.getElementById('explorer')) document.body.classList.add('whole');
  if (location.hash) { // the frame has moved what the address names
    var there = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (there && there.closest('table')) there.scrollIntoView({ block: 'center' });
  }
})();
