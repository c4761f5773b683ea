"""Things to ask an instruct model about."""

from __future__ import annotations

_WORDS = """
airports, alarm clocks, ants, apples, aquariums, avalanches, bakeries, balloons, bamboo, barns, batteries, bats,
beaches, beavers, bells, bicycles, birthdays, blankets, blood, boats, bones, boots, bread, bricks, bridges, brooms,
bubbles, buses, butter, butterflies, cables, cactuses, calendars, cameras, camels, candles, canoes, carpets,
carrots, castles, caterpillars, caves, chairs, chalk, cheese, cherries, chess, chimneys, chocolate, circuses, clay,
cliffs, clouds, coal, coffee, coins, comets, compasses, concerts, cookies, copper, coral reefs, corn, cotton,
cranes, crickets, crowns, cucumbers, curtains, dams, deer, deserts, dice, dictionaries, diamonds, dolphins, donkeys,
doors, dragonflies, dreams, drums, ducks, eagles, earthquakes, echoes, eclipses, eggs, elections, elephants,
elevators, engines, envelopes, erasers, factories, farms, feathers, fences, ferries, fireworks, fishing, flags,
floods, flowers, flutes, fog, footprints, forests, forks, fossils, fountains, foxes, friendship, frogs, frost,
gardens, garlic, geysers, giraffes, glaciers, glass, gloves, glue, goats, gold, grapes, gravity, guitars, gyms,
hail, hammers, harbours, hats, hedgehogs, helicopters, holidays, honey, horses, hospitals, hotels, hurricanes, ice
cream, icebergs, ink, insects, islands, jackets, jam, jellyfish, jewellery, juggling, jungles, kangaroos, kettles,
keys, kitchens, kites, knives, knots, ladders, lakes, lamps, languages, lanterns, laundry, leather, lemons, letters,
libraries, lighthouses, lightning, lizards, locks, magnets, mailboxes, maps, marathons, markets, marriage, masks,
matches, medals, melons, memory, metal, microscopes, milk, mills, mines, mirrors, money, monkeys, moonlight,
mosquitoes, moss, motorbikes, mountains, mushrooms, museums, music, nails, needles, nests, newspapers, noodles,
nuts, oak trees, oil, olives, onions, orchards, orchestras, owls, paint, palaces, pancakes, parachutes, parades,
parks, parrots, patience, peaches, pencils, penguins, pepper
"""
TOPICS = tuple(word.strip() for word in _WORDS.replace("\n", " ").split(","))
